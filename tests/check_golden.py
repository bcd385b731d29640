"""Compare every part with recorded inputs and outputs of the reference implementation of LTX-2.3.

    python tests/check_golden.py tests/golden [--tokenizer tokenizer.json]

Prints one line per comparison, `file case largest-absolute-difference`, and at the end `worst
<number>`; the exit status is 0 only when every line is at most 1e-4. Sizes, seeds, grids and cases
are read from the files, so the same command works on another folder of this layout. What each file
holds is told by its own metadata ("about"); in short:

    transformer*     weights; io.<case>.{latent, timesteps, sigma, positions, context[, masks],
                     velocity, x0[, debug.*]}
    rope*            <case>.{positions, freqs, cos, sin, q, q_rot}
    vae_*            weights of one half or both; io.<case>.{video, latent[, patchified]},
                     io.unpatchify_{in,out}
    text_connector*  weights; io.<case>.{hidden_states, attention_mask, normed, features, context}
    gemma3*          weights; io.{input_ids, attention_mask, hidden_states}
    schedule*        sigmas.<i>, train.{normal, uniform_value, uniform_choice, t.<tokens>}
    sampler*         a whole Euler run with given velocities
    gemma3_tokens*   JSON list of {text, ids}; needs --tokenizer, and must agree exactly

Weights go through the very loaders that read the published files. Padded places of the text path
are not compared where their numbers mean nothing. Hardware: CPU, some seconds.
"""

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from guidance import Guidance, guide
from losses import clean_estimate
from ltx import text as text_module
from ltx.checkpoint import load_weights, read_metadata
from ltx.gemma import load_gemma
from ltx.tokenizer import Tokenizer
from ltx.vae import VAE_PREFIX, VideoVAE, patch_pixels, unpatch_pixels
from model import (
    TRANSFORMER_PREFIX,
    TransformerConfig,
    VideoTransformer,
    euler_step,
    ltx_sigmas,
    training_sigmas,
)
from rope import apply_rotary, rotary_frequencies, rotary_tables

TOLERANCE = 1e-4
Result = tuple[str, float]  # case, largest absolute difference


def difference(ours: Tensor, golden: Tensor, where: Tensor | None = None) -> float:
    """Largest absolute difference; a wrong shape or a NaN counts as infinite.

    where (bool): the places that count.
    """
    if ours.shape != golden.shape:
        return math.inf
    error = (ours.double() - golden.double()).abs()
    error = error if where is None else error[where]
    return error.max().item() if error.isfinite().all() else math.inf


def cases(tensors: dict[str, Tensor], last: str, prefix: str = "io.") -> list[str]:
    """Names between `prefix` and `.last`."""
    found = (re.fullmatch(re.escape(prefix) + r"(.+)\." + re.escape(last), key) for key in tensors)
    return sorted(match[1] for match in found if match)


def build(make, path: Path, prefix: str) -> nn.Module:
    with torch.device("meta"):
        module = make()
    return load_weights(module, path, prefix).eval()


# ------------------------------------------------------------ one function per kind of file


def check_transformer(path: Path, tensors: dict[str, Tensor], config: dict) -> Iterator[Result]:
    sizes = TransformerConfig.from_checkpoint(config["transformer"])
    model = build(lambda: VideoTransformer(sizes), path, TRANSFORMER_PREFIX)
    names = ("latent", "timesteps", "sigma", "positions", "context", "context_mask",
             "attention_mask")
    for case in cases(tensors, "velocity"):
        prefix = f"io.{case}."
        golden = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        inputs = {name: golden[name] for name in names if name in golden}
        if stg := re.search(r"stg\w*?(\d+)", case):
            inputs["skip_blocks"] = (int(stg[1]),)
        elif case.startswith("stg"):
            inputs["skip_blocks"] = (config["io"]["stg_block"],)
        velocity = model(**inputs)
        yield f"{case}.velocity", difference(velocity, golden["velocity"])
        if "x0" in golden:
            x0 = clean_estimate(golden["latent"], velocity, golden["timesteps"][..., None])
            yield f"{case}.x0", difference(x0, golden["x0"])
        debug = {k.removeprefix("debug."): t for k, t in golden.items() if k.startswith("debug.")}
        seen = inside(model, inputs) if debug else {}
        for name, value in sorted(debug.items()):
            ours = seen.get(name)
            error = math.inf if ours is None else difference(ours.reshape(value.shape), value)
            yield f"{case}.debug.{name}", error


def inside(model: VideoTransformer, inputs: dict) -> dict[str, Tensor]:
    """Intermediate values of one pass, under the names of the recording."""
    seen: dict[str, Tensor] = {}

    def keep(module: nn.Module, *names: str):
        def hook(_, __, out):
            seen.update(zip(names, out if isinstance(out, tuple) else (out,), strict=False))

        return module.register_forward_hook(hook)

    hooks = [keep(model.patchify_proj, "patchify_out"),
             keep(model.adaln_single, "adaln_out", "embedded_timestep"),
             keep(model.prompt_adaln_single, "prompt_adaln_out")]
    hooks += [keep(block, f"block{i}") for i, block in enumerate(model.transformer_blocks)]
    with torch.enable_grad():  # as in training: a row of modulation per token, not per noise level
        model(**inputs)
    for hook in hooks:
        hook.remove()
    c = model.config
    tables = rotary_tables(inputs["positions"], c.dim, c.heads, c.theta, c.max_pos)
    seen |= zip(("rope_cos", "rope_sin"), tables, strict=True)
    return {name: value.detach() for name, value in seen.items()}


def check_rope(path: Path, tensors: dict[str, Tensor], config: dict) -> Iterator[Result]:
    for case in cases(tensors, "positions", prefix=""):
        sizes = config["cases"][case]
        positions, q = tensors[f"{case}.positions"], tensors[f"{case}.q"]
        if positions.ndim == 4 and not sizes.get("middle_of_patch", True):
            positions = positions[..., 0]
        cos, sin = rotary_tables(positions, sizes["dim"], sizes["heads"], sizes["theta"],
                                 sizes["max_pos"])
        heads = q.unflatten(-1, (sizes["heads"], -1)).transpose(1, 2)  # (B, nh, N, hd)
        count = sizes["dim"] // (2 * positions.shape[1])
        ours = {"freqs": rotary_frequencies(count, sizes["theta"]), "cos": cos, "sin": sin,
                "q_rot": apply_rotary(heads, cos, sin).transpose(1, 2).flatten(2)}
        for name, value in ours.items():
            yield f"{case}.{name}", difference(value, tensors[f"{case}.{name}"])


def check_vae(path: Path, tensors: dict[str, Tensor], config: dict) -> Iterator[Result]:
    with torch.device("meta"):
        vae = VideoVAE(config["vae"]).eval()
    halves = [half for half in ("encoder", "decoder")
              if any(key.startswith(f"{VAE_PREFIX}{half}.") for key in tensors)]
    for part in ("per_channel_statistics", *halves):
        load_weights(getattr(vae, part), path, f"{VAE_PREFIX}{part}.")
    for case in cases(tensors, "latent"):
        video, latent = tensors[f"io.{case}.video"], tensors[f"io.{case}.latent"]
        if "encoder" in halves:
            yield f"{case}.latent", difference(vae.encode(video), latent)
        if "decoder" in halves:
            yield f"{case}.video", difference(vae.decode(latent), video)
    patch = config["vae"]["patch_size"]
    for case in cases(tensors, "patchified"):
        ours = patch_pixels(tensors[f"io.{case}.video"], patch)
        yield f"{case}.patchified", difference(ours, tensors[f"io.{case}.patchified"])
    if "io.unpatchify_in" in tensors:
        ours = unpatch_pixels(tensors["io.unpatchify_in"], patch)
        yield "unpatchify_out", difference(ours, tensors["io.unpatchify_out"])


def check_text(path: Path, tensors: dict[str, Tensor], config: dict) -> Iterator[Result]:
    settings = config["transformer"]
    connector = build(lambda: text_module.Connector(settings), path, text_module.CONNECTOR_PREFIX)
    for case in cases(tensors, "hidden_states"):
        golden = {name: tensors.get(f"io.{case}.{name}") for name in (
            "hidden_states", "attention_mask", "normed", "features", "context", "context_mask")}
        states, mask = list(golden["hidden_states"]), golden["attention_mask"]
        width, count = states[0].shape[-1], len(states)
        extractor = build(lambda w=width, n=count: text_module.FeatureExtractor(settings, w, n),
                          path, text_module.EXTRACTOR_PREFIX)
        valid, features = mask > 0, extractor(states, mask)
        yield f"{case}.normed", difference(extractor.normalised(states, mask), golden["normed"],
                                           valid)
        yield f"{case}.features", difference(features, golden["features"], valid)
        yield f"{case}.context", difference(connector(features, mask), golden["context"])
        if (seen := golden["context_mask"]) is not None:  # we keep none, so it has to be all ones
            yield f"{case}.context_mask", difference(torch.ones_like(seen), seen)


def check_gemma(path: Path, tensors: dict[str, Tensor], config: dict) -> Iterator[Result]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        shutil.copyfile(path, Path(folder) / "model.safetensors")
        gemma = load_gemma(folder)
    for prefix in ["io."] + [f"io.{case}." for case in cases(tensors, "input_ids")]:
        if f"{prefix}input_ids" not in tensors:
            continue
        mask, golden = tensors[f"{prefix}attention_mask"], tensors[f"{prefix}hidden_states"]
        states = gemma(tensors[f"{prefix}input_ids"], mask)
        if len(states) != len(golden):
            yield f"{prefix[3:]}hidden_states", math.inf
        for i, (ours, theirs) in enumerate(zip(states, golden, strict=False)):
            yield f"{prefix[3:]}hidden_states.{i}", difference(ours, theirs, mask > 0)


def check_schedule(path: Path, tensors: dict[str, Tensor], config: dict) -> Iterator[Result]:
    for name, run in config["sigmas"].items():
        ours = ltx_sigmas(run["steps"], run["tokens"])
        yield f"sigmas.{name}", difference(ours, tensors[f"sigmas.{name}"])
    draws = [tensors[f"train.{name}"] for name in ("normal", "uniform_value", "uniform_choice")]
    for key in sorted(key for key in tensors if key.startswith("train.t.")):
        ours = training_sigmas(int(key.rpartition(".")[2]), *draws)
        yield key, difference(ours, tensors[key])


def check_sampler(path: Path, tensors: dict[str, Tensor], config: dict) -> Iterator[Result]:
    """The whole run from the noise on, with our own values carried from step to step.

    LTX-2.3's own guidance, cond + (cfg - 1) (cond - uncond) + stg (cond - perturbed), is ours
    without a reference. Tokens that its mask keeps are put back after every estimate.
    """
    sigmas = ltx_sigmas(config["steps"], config.get("tokens", 4096))
    yield "sigmas", difference(sigmas, tensors["sigmas"])
    guidance = Guidance(config["cfg_scale"], ref_scale=0.0, rescale=config["rescale_scale"],
                        stg_scale=config["stg_scale"])
    mask = tensors["denoise_mask"]
    kept = tensors["clean_latent"] * (1 - mask)
    x = tensors["noise"] * mask + kept
    yield "latent.0", difference(x, tensors["latent.0"])
    for i in range(config["steps"]):
        levels = mask * sigmas[i]
        yield f"timesteps.{i}", difference(levels, tensors[f"timesteps.{i}"])

        def predict(text: bool, ref: bool, skip_blocks: tuple = (), x=x, levels=levels, i=i):
            name = "ptb" if skip_blocks else "cond" if text else "uncond"
            return clean_estimate(x, tensors[f"velocity_{name}.{i}"], levels)

        x0 = guide(predict, guidance)
        yield f"guided_x0.{i}", difference(x0, tensors[f"guided_x0.{i}"])
        x0 = x0 * mask + kept
        yield f"blended_x0.{i}", difference(x0, tensors[f"blended_x0.{i}"])
        x = euler_step(x, x0, sigmas[i], sigmas[i + 1])
        yield f"latent.{i + 1}", difference(x, tensors[f"latent.{i + 1}"])


KINDS = {"transformer": check_transformer, "rope": check_rope, "vae": check_vae,
         "text_connector": check_text, "gemma3": check_gemma, "schedule": check_schedule,
         "sampler": check_sampler}


# ------------------------------------------------------------ the folder


def check_file(path: Path) -> Iterator[Result]:
    check = next((check for kind, check in KINDS.items() if path.name.startswith(kind)), None)
    if check is None:
        print(f"{path.name}: expected a name beginning with one of {sorted(KINDS)}")
        yield "unknown-kind", math.inf
        return
    try:
        with torch.no_grad():
            yield from check(path, load_file(path), read_metadata(path)["config"])
    except (ValueError, KeyError, RuntimeError) as error:  # goes on, and fails at the end
        print(f"{path.name}: {type(error).__name__}: {error}")
        yield "not-comparable", math.inf


def check_tokens(path: Path, tokenizer_file: Path) -> float:
    """How many of the recorded strings get other ids; 0 is the only good number."""
    tokenizer = Tokenizer(tokenizer_file)
    recorded = json.loads(path.read_text(encoding="utf-8"))
    wrong = [case["text"] for case in recorded
             if [tokenizer.bos, *tokenizer.raw_ids(case["text"])] != case["ids"]]
    if wrong:
        print(f"{path.name}: {len(wrong)} of {len(recorded)} strings differ, first {wrong[0]!r}")
    return float(len(wrong)) if recorded else math.inf


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="folder with the golden files")
    parser.add_argument("--tokenizer", type=Path,
                        help="Gemma 3's tokenizer.json (default: tokens are not compared)")
    args = parser.parse_args(arguments)
    errors: list[float] = []
    for path in sorted(args.folder.glob("*.safetensors")):
        before = len(errors)
        for case, error in check_file(path):
            print(f"{path.name} {case} {error:.3g}")
            errors.append(error)
        if len(errors) == before:
            print(f"{path.name} nothing-compared inf")
            errors.append(math.inf)
    for path in sorted(args.folder.glob("gemma3_tokens*.json")):
        if args.tokenizer is None:
            print(f"{path.name} ids skipped (no --tokenizer)")
        else:
            errors.append(check_tokens(path, args.tokenizer))
            print(f"{path.name} ids {errors[-1]:.3g}")
    worst = max(errors, default=math.inf)  # an empty folder proves nothing
    print(f"worst {worst:.3g}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
