"""The 22B model on a card that only pretends: no tensor in the wrong place, and the plan's bytes.

Sampling from prompt to decoded frames, and steps of training, go through the product's own code on
"cuda" (fake_cuda.py says what that can show and what not). A tensor on the wrong device, of a wrong
type or shape fails; so does a number that a transformer block reads back from the card.

Not run so: torch.compile, several processes, mp4 writing (no numbers), --full on the VAE's side,
the float32 encoding of clips, and whatever a kernel, a stream or the allocator would do.

Hardware: CPU with g++, half a minute. Run: python -m pytest tests/test_fake_cuda.py -rP
"""

import argparse
import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import fake_cuda
import pytest
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
MARGIN = 0.1  # of the plan; the bytes that it adds for safety are left out
FEW = 5       # blocks; two at either end are never rounded, so one is


def run(what: str) -> dict:
    """This file in a process of its own, where "cuda" is fake; what it prints."""
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch knows real cards")
    if (library := fake_cuda.build()) is None:
        pytest.skip("no g++ to build the fake card's driver with")
    env = os.environ | {"FAKE_CUDA": str(library), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, __file__, what], env=env, cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(found: dict, bytes_of_plan: dict[str, int]) -> None:
    worst = {}
    for name, planned in bytes_of_plan.items():
        peak, inside = found[name]["peak"], found[name]["inside"]
        print(f"{name:52s} {peak / 1e9:6.2f} GB, plan {planned / 1e9:6.2f}")
        worst[name] = peak / planned - 1
        assert not inside, f"{name}: a block waits for the card: {inside}"
    assert max(worst.values()) < MARGIN and min(worst.values()) > -MARGIN, worst


def with_blocks(count: int) -> dict:
    from ltx.plan import REAL

    return REAL | {"transformer": REAL["transformer"] | {"num_layers": count}}


@functools.cache
def workspace() -> int:
    """What the plan adds for a library's convolution; no library is at work here."""
    from ltx.plan import REAL, LiveBytes
    from ltx.vae import VideoVAE

    with torch.device("meta"), torch.no_grad(), LiveBytes() as live:
        vae = VideoVAE(REAL["vae"]).to(torch.bfloat16)
        for _ in vae.decode_tiles(torch.empty(1, 128, 16, 16, 24, dtype=torch.bfloat16)):
            pass
    return live.workspace


def test_sampling_at_full_size_takes_what_the_plan_says():
    from ltx import plan as p

    found, expected = run("sampling"), {}
    for blocks in (48, FEW):
        for option, stages in p.plan(with_blocks(blocks)).needs.items():
            need = {stage: sum(terms.values()) - p.RESERVE for stage, terms in stages.items()}
            need["text"] = max(need.pop(part) for part in ("Gemma", "projection", "connector"))
            need["decode, tiled"] -= workspace()
            expected |= {f"{blocks} {option}: {stage}": size for stage, size in need.items()}
    check(found, {name: expected[name] for name in found})
    assert len(found) == 9 and {name for name, one in found.items() if one["mask"]} == {
        "48 no flag: text", "48 --offload disk: text"}, "only text is padded"


def test_training_at_full_size_takes_what_the_plan_says():
    from clips.frames import Bucket
    from ltx.plan import RESERVE
    from training.plan import OPTIONS, training_plan

    found, expected = run("training"), {}
    for blocks, w_id in ((48, 0.1), (FEW, 0.1), (FEW, 0.0)):
        args = argparse.Namespace(rank=32, w_id=w_id)
        p = training_plan(with_blocks(blocks), Bucket(512, 768, 121), args)
        for option in OPTIONS:
            name = f"{blocks} {option}" + " --w-id 0" * (w_id == 0)
            expected[name] = total = sum(p.needs[option].values()) - RESERVE
            # AdamW's two averages come with the second step
            expected[f"{name}, first step"] = total - 8 * p.sizes["A"]
    full = found.pop(f"{FEW} --full --w-id 0, first step")
    check(found, {name: expected[name] for name in found})
    assert len(found) == 7 and not any(one["mask"] for one in found.values()), "flash serves"
    assert not full["inside"] and full["peak"] > 2.5 * found[f"{FEW} no flag"]["peak"], "float32"


# ------------------------------------------------------------ in the other process


def watched(card: fake_cuda.Card, work, *given) -> tuple[dict, object]:
    """What work(*given) took of the card; and its result."""
    card.reset()
    result = work(*given)
    masks = sum(n for (kind, _), n in fake_cuda.CHOSEN.items() if kind == "mask")
    inside = [place for place in card.reads if "inside a block" in place]
    return {"peak": card.peak, "inside": inside, "mask": masks}, result


def train_steps(folder: Path) -> dict:
    from bench import card as bench

    found, face = {}, (256, 128, 512, 384)  # half of the height
    for blocks, flags in ((48, ""), (FEW, ""), (FEW, "--quantization fp8-cast --w-id 0"),
                          (FEW, "--offload cpu --w-id 0"), (FEW, "--offload disk --w-id 0"),
                          (FEW, "--offload cpu --quantization fp8-cast --w-id 0"),
                          (FEW, "--full --w-id 0")):
        gc.collect()
        file = bench.published_file(folder / "a", blocks)
        name = f"{blocks} {flags or 'no flag'}"
        with fake_cuda.Card() as card:
            step = bench.stepper(bench.prepare(file, flags.split(), "cuda", face=face))
            found[f"{name}, first step"], _ = watched(card, step)
            if name == f"{FEW} no flag":
                found[name], _ = watched(card, step)
            del step
    return found


def sample_stages(folder: Path) -> dict:
    import sample
    from bench import card as bench
    from bench import official
    from ltx import options

    gemma = folder / "gemma"
    gemma.mkdir()
    rows = [(f"language_model.model.{name}", torch.bfloat16, shape)
            for name, shape in official.table(official.GEMMA_PLAIN).items()]
    official.write_sparse(gemma / "model.safetensors", rows, {"format": "pt"})
    (gemma / "config.json").write_text(json.dumps(official.GEMMA))
    shutil.copy(ROOT / "weights" / "tiny" / "gemma" / "tokenizer.json", gemma)
    words = ["--ref", ROOT / "examples" / "ada.png", "--prompt", "a person", "--gemma-root", gemma,
             "--output-path", folder / "out.mp4", "--device", "cuda"]

    def resolved(blocks: int, *flags: str):
        file = bench.published_file(folder / "a", blocks)
        args = options.build_parser().parse_args(
            [*map(str, words), "--checkpoint-path", str(file), *flags])
        return args, *sample.resolve(args)

    def made(args, contexts, faces) -> list:
        references = [face for face, _ in faces]
        return list(sample.generate(args, [0], contexts, references, tqdm(disable=True)))

    def frames(args, latent) -> list:
        vae = sample.VideoVAE.load(args.checkpoint_path, args.device, args.torch_dtype)
        return [None for _ in sample.decode(vae, latent, args.torch_dtype)]

    found = {}
    with fake_cuda.Card() as card, torch.no_grad():
        args, cases, floor = resolved(48, "--num-inference-steps", "2")
        found["48 no flag: text"], contexts = watched(card, sample.encode_prompts, args, cases)
        found["48 no flag: encode"], faces = watched(
            card, sample.encode_faces, args, cases, floor)
        found["48 no flag: denoise"], (latent,) = watched(card, made, args, contexts, faces)
        found["48 no flag: decode, tiled"], _ = watched(card, frames, args, latent)
        args, cases, _ = resolved(48, "--offload", "disk")
        found["48 --offload disk: text"], _ = watched(card, sample.encode_prompts, args, cases)
        for flags in ("--offload cpu", "--offload disk", "--quantization fp8-cast",
                      "--offload disk --quantization fp8-cast"):
            gc.collect()
            args, _, _ = resolved(FEW, "--num-inference-steps", "1", *flags.split())
            found[f"{FEW} {flags}: denoise"], _ = watched(card, made, args, contexts, faces)
    return found


if __name__ == "__main__":
    import ltx.offload
    import training.frozen

    gc.disable()  # it would look through the tensors of 48 blocks again and again
    fake_cuda.install(ltx.offload, training.frozen)
    runs = {"sampling": sample_stages, "training": train_steps}
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(runs[sys.argv[1]](Path(scratch))))
