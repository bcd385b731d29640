"""A face and a prompt in, a video out: the main job, end to end.

    prompt --text.py--> context ---------------------------------.
    face --letterbox--> canvas --vae.py--> reference tokens ------+--> model.py, step by step --vae.py--> out.mp4
    seed --> noise ----------------------------------------------'

The idea. Every part of ST-DRC (arXiv 2606.02441) has its own file; here they meet, in the order in which data passes
through them, stage after stage: each loads its weights, works and frees them, so that the largest stage decides how
much memory is needed and not their sum. The method at inference is one of them, denoise.py. All that can be checked is
checked before the first heavy stage begins: a spelling mistake must not cost an hour.

paper:       a reference picture and a prompt in, a video of that person out (abstract, figure).
LTX-2.3:     noise schedule, default sizes, steps and text scale.
our reading: order of guidance and its scales (guidance.py). --rescale measures the spread on the video tokens only,
             because the streams have unequal numbers of tokens.

Conventions. Scales: 1 = not amplified, --ref-scale 0 = no face in the order text_first; --rescale 0, --guide-range 0 1
and --guide-every 1 = off. Sigma 1 = noise, 0 = data. What the checkpoint's config says under "inference" (size, steps,
scales) is the default, otherwise LTX-2.3's own numbers: the small bundled model and the 22B model take the same path.
Noise is drawn on the CPU, so a seed means the same noise on every device. Beside out.mp4 stand out.png (reference and
frames) and out.json (what to repeat it with).

Read next: train.py
"""

import argparse
import importlib.metadata
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from clips.frames import open_picture
from clips.video import write_outputs
from common.cli import Parser, check_ranges, command
from common.files import temp_path
from denoise import INFERENCE, STREAM_NAMES, denoise, guidance_steps
from guidance import ORDERS, stream_weights
from ltx import plan
from ltx.checkpoint import check_weights, load_weights, read_metadata, shapes_from
from ltx.fast_cpu import FastCPU
from ltx.lora import load_lora, lora_changes, read_lora
from ltx.offload import OFFLOADS, cast_linears, load_streamed
from ltx.text import check_text, encode_once
from ltx.vae import Tiling, VideoVAE, psnr
from model import DISTILLED_SIGMAS, TRANSFORMER_PREFIX, TransformerConfig, VideoTransformer, ltx_sigmas
from reference import encode_reference, letterbox, unpatchify
from rope import PLACEMENTS, reference_grid

TINY = Path(__file__).resolve().parent / "weights" / "tiny"
VAE_PREFIX = "vae."  # LTX-2.3: names in the file
SMALL = 16  # pixels; our reading: no face can be told from another below
LTX23_COMMAND = "--checkpoint-path ltx-2.3-22b-dev.safetensors --gemma-root gemma-3-12b-it-qat-q4_0-unquantized"
EXAMPLES = f"""
examples:
  python sample.py --ref examples/ada.png --prompt "a person in a red shirt turns left in a park, in daylight"
  python sample.py --ref face.jpg --prompt "A woman of about 60 with grey hair laughs in the rain." \\
      {LTX23_COMMAND} --lora st-drc.safetensors
  python sample.py --plan     what the real model needs, and which card holds it
"""


# ------------------------------------------------------------ stages: each loads its weights, works, and frees them
def encode_prompts(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Contexts of the prompt and of the negative prompt, (1, N, D) each."""
    # LTX-2.3: "null text" is the negative (or empty) prompt sent through the encoder, not a context of zeros.
    prompts, offload = [args.prompt, args.negative_prompt], args.offload_text or args.offload
    context, counts = encode_once(prompts, args.checkpoint_path, args.gemma_root, device, dtype, offload)
    for name, count in zip(("prompt", "negative prompt"), counts, strict=True):
        if count > context.shape[1]:
            warn(f"the {name} has {count} tokens, only the first {context.shape[1]} are read")
    return finite(context, f"the text model in {args.gemma_root} and its connector").split(1)


def load_vae(args: argparse.Namespace, config: dict, device: torch.device, dtype: torch.dtype) -> VideoVAE:
    with torch.device("meta"):
        vae = VideoVAE(config["vae"])
    return load_weights(vae, args.checkpoint_path, VAE_PREFIX, dtype, device)


def encode_face(args: argparse.Namespace, config: dict, canvas: Tensor, device: torch.device,
                dtype: torch.dtype) -> tuple[Tensor, float]:
    """Reference tokens (1, R, C) and how well the VAE redraws them, in dB."""
    vae = load_vae(args, config, device, dtype)
    picture = canvas.to(device, dtype)                                                    # (1, 3, h, w)
    reference = finite(encode_reference(vae.encode, picture), "the VAE's encoder")        # (1, R, C)
    seen = vae.decode(unpatchify(reference, 1, args.height // vae.space_scale, args.width // vae.space_scale))
    fidelity = psnr(finite(seen, "the VAE's decoder")[:, :, 0].float(), picture.float()).item()
    floor = config.get("inference", {}).get("reference_psnr_floor")
    if floor is not None and fidelity < floor:  # a VAE that cannot redraw a picture has never seen its kind
        warn(f"the reference survives encoding at {fidelity:.1f} dB, below {floor:g}: this checkpoint only knows the "
             f"procedural world's people, so the face will not be followed; {LTX23_COMMAND} load LTX-2.3")
    return reference, fidelity


def finite(numbers: Tensor, source: str) -> Tensor:
    """Numbers as they are; a damaged file shows where its part is used and not an hour later, in the picture."""
    if not numbers.isfinite().all():
        raise ValueError(f"expected finite numbers from {source}, got NaN or infinity; use --dtype float32, or download "
                         "the weights again")
    return numbers


def latent_grid(args: argparse.Namespace, vae: VideoVAE) -> tuple[int, int, int]:
    """Frames, rows and columns of the latent video."""
    return (args.num_frames - 1) // vae.time_scale + 1, args.height // vae.space_scale, args.width // vae.space_scale


def load_transformer(args: argparse.Namespace, config: dict, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The transformer with its LoRAs, in float8 and streamed if asked for."""
    with torch.device("meta"):
        transformer = VideoTransformer(TransformerConfig.from_checkpoint(config["transformer"]))
    # Fused while loading: before rounding to float8, and again and again where blocks are read from disk in every step.
    change = lora_changes(transformer, args.lora) if args.lora_mode == "fused" else None
    if args.quantization == "fp8-cast":
        cast_linears(transformer.transformer_blocks)
    load_streamed(transformer, "transformer_blocks", args.checkpoint_path, TRANSFORMER_PREFIX, dtype, device,
                  args.offload, change)
    if args.lora_mode == "applied":
        for path, strength in args.lora:
            load_lora(transformer, path, strength, fuse=False)
    return transformer.eval()


def generate(args: argparse.Namespace, config: dict, contexts: tuple[Tensor, Tensor], reference: Tensor,
             vae: VideoVAE, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Latent video (1, C, F, H, W). vae: for its scales alone, it needs no weights."""
    transformer = load_transformer(args, config, device, dtype)
    scales, grid = (vae.time_scale, vae.space_scale), latent_grid(args, vae)
    generator = torch.Generator().manual_seed(args.seed)
    noise = torch.randn(1, math.prod(grid), vae.latent_channels, generator=generator).to(device)
    sigmas = torch.tensor(DISTILLED_SIGMAS) if args.distilled else ltx_sigmas(args.num_inference_steps,
                                                                              args.schedule_tokens)
    return denoise(transformer, *contexts, reference, grid, args.frame_rate, scales, sigmas, noise, args.text_scale,
                   args.ref_scale, args.order, args.rescale, args.placement, True, args.phase_scale, args.stg_scale,
                   args.stg_blocks, args.guide_range, args.guide_every)


def decode(args: argparse.Namespace, config: dict, latent: Tensor, device: torch.device,
           dtype: torch.dtype) -> Iterator[Tensor]:
    """Runs of finished frames (3, f, h, w), each made when it is asked for."""
    vae = load_vae(args, config, device, dtype)
    for frames in vae.decode_tiles(latent.to(dtype), None if args.no_tiling else Tiling()):
        frames = frames[0]
        yield frames
        del frames  # before the next tile needs the room


@torch.no_grad()
def run(args: argparse.Namespace, config: dict, canvas: Tensor) -> None:
    """Text, reference, denoising, decoding and files: one after the other, so that only one part's weights are loaded.

    args from `resolve`, canvas (1, 3, h, w).
    """
    seconds: dict[str, float] = {}
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    with torch.device("meta"):
        shapes = VideoVAE(config["vae"])
    with stage("text", seconds, device):
        contexts = encode_prompts(args, device, dtype)
    with stage("reference", seconds, device):
        reference, fidelity = encode_face(args, config, canvas, device, dtype)
    with stage("denoise", seconds, device):
        latent = generate(args, config, contexts, reference, shapes, device, dtype)
    packages = ("torch", "safetensors", "numpy", "pillow", "av")
    record = {"arguments": settings(args), "seed": args.seed, "device": args.device, "dtype": args.dtype,
              "versions": {"python": sys.version.split()[0], **{p: importlib.metadata.version(p) for p in packages}},
              "reference_psnr_db": round(fidelity, 2), "seconds": seconds}
    write_outputs(args.output_path, decode(args, config, latent, device, dtype), args.num_frames, canvas[0],
                  args.frame_rate, record)


@contextmanager
def stage(name: str, seconds: dict[str, float], device: torch.device) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()  # otherwise the clock stops before the work does
        torch.cuda.empty_cache()
        torch.accelerator.empty_host_cache()  # page-locked memory, which PyTorch keeps for itself otherwise
    seconds[name] = round(time.perf_counter() - start, 2)


# ------------------------------------------------------------ what the user asked for, checked before any heavy work
def build_parser() -> Parser:
    parser = Parser("sample.py", description="A face and a prompt in, a video of that person out (ST-DRC on LTX-2.3).",
                    epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add, known = parser.add_argument, {k: f"(default: the checkpoint's, else {v})" for k, v in INFERENCE.items()}
    add("--ref", type=Path, metavar="PICTURE", help="the face, any format and size (required)")
    add("--prompt", help="what happens, beginning with a description of the person (required)")
    add("--negative-prompt", default="", help="what to steer away from (default: empty)")
    add("--checkpoint-path", type=Path, help=f"(default: {TINY / 'model.safetensors'})")
    add("--gemma-root", type=Path, help=f"folder of the text model (default: {TINY / 'gemma'})")
    add("--lora", nargs="+", action="append", default=[], metavar=("PATH", "STRENGTH"),
        help="LoRA file and strength; give it again for another (default: none, strength 1)")
    add("--lora-mode", choices=("fused", "applied"), default="fused",
        help="added into the weights, or kept beside them: exact, slower (default: %(default)s)")
    add("--output-path", type=Path, default=Path("out.mp4"), help="(default: %(default)s; .png and .json beside it)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--height", type=int, help=f"pixels {known['height']}")
    add("--width", type=int, help=f"pixels {known['width']}")
    add("--num-frames", type=int, help=known["num_frames"])
    add("--frame-rate", type=float, help=f"frames per second, 1 to 240 {known['frame_rate']}")
    add("--num-inference-steps", type=int, help=known["steps"])
    add("--text-scale", type=float, help=f"1 = prompt not amplified {known['text_scale']}")
    add("--ref-scale", type=float, help=f"1 = face not amplified, 0 = no face (order text_first) {known['ref_scale']}")
    add("--rescale", type=float, help=f"0 = off, 0.7 calms burnt colours {known['rescale']}")
    add("--guide-range", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help=f"noise levels at which all streams are run, elsewhere one {known['guide_range']}")
    add("--guide-every", type=int, help=f"run all streams every so many steps only {known['guide_every']}")
    add("--stg-scale", type=float, help=f"perturbed stream, LTX-2.3 uses 1, 0 = off {known['stg_scale']}")
    add("--stg-blocks", type=int, nargs="+", metavar="BLOCK", help=f"what it perturbs {known['stg_blocks']}")
    add("--distilled", action="store_true", help="distilled weights: 8 fixed steps, one stream, no scales (default: off)")
    add("--order", choices=ORDERS, default=ORDERS[0], help="how the streams are summed (default: %(default)s)")
    add("--placement", choices=sorted(PLACEMENTS), help="reference positions (default: as trained, else tass)")
    add("--force-placement", action="store_true", help="--placement although trained with another (default: off)")
    add("--phase-scale", type=float, default=1.0, help="turn of overlap_phase's reference tokens (default: %(default)s)")
    add("--offload", choices=OFFLOADS, default="none", help="where layers wait for their turn (default: %(default)s)")
    add("--offload-text", choices=OFFLOADS, help="the same for the text model's layers (default: as --offload)")
    add("--quantization", choices=("none", "fp8-cast"), default="none",
        help="fp8-cast: one byte per number of the transformer's matrices (default: %(default)s)")
    add("--no-tiling", action="store_true", help="decode the video in one piece: exact, large (default: off)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="(default: float32 on CPU, else bf16)")
    add("--dry-run", action="store_true", help="check everything, print the settings, write nothing (default: off)")
    add("--plan", action="store_true", help="print what fits on which card, and why; loads nothing (default: off)")
    return parser


def resolve(args: argparse.Namespace) -> tuple[dict, Tensor]:
    """Fill in every default and check everything that can be checked without reading weights.

    Returns the checkpoint's config and the letterboxed reference (1, 3, h, w). Raises ValueError on the first mistake.
    """
    args.checkpoint_path = args.checkpoint_path or TINY / "model.safetensors"
    args.gemma_root = args.gemma_root or TINY / "gemma"
    check_paths(args)
    metadata = read_metadata(args.checkpoint_path)
    config = metadata["config"]
    transformer, vae = check_parts(args, config)
    resolve_loras(args, transformer, metadata)
    defaults = read_defaults(config, args.checkpoint_path)
    resolve_numbers(args, defaults, vae)
    resolve_streams(args, transformer.config.num_layers)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a CUDA device, got none on this machine; use --device cpu")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    check_memory(args, config, vae)
    canvas = load_canvas(args.ref, args.height, args.width)
    if not any(char.isprintable() and not char.isspace() for char in args.prompt):
        warn("the prompt is empty or nothing that can be read, so the video shows whatever the model likes")
    if broken_text(args.prompt + args.negative_prompt):
        warn("a prompt holds bytes that are no text, each is read as '?'")
    sizes = ("height", "width", "num_frames")  # LTX-2.3 was trained on many sizes, so its config names none
    if "inference" in config and any(getattr(args, name) != defaults[name] for name in sizes):
        warn(f"this checkpoint was trained at {defaults['width']}x{defaults['height']}, {defaults['num_frames']} frames; "
             "at another size its videos fall apart")
    # paper: TASS puts the reference beyond the video, up to twice its size. LTX-2.3: trained up to 2048 pixels.
    limit = min(transformer.config.max_pos[1:])
    if (side := max(args.height, args.width)) * 2 > limit:
        warn(f"a side of {side} px puts reference positions beyond the trained {limit} px; stay within {limit // 2} px")
    return config, canvas


def check_parts(args: argparse.Namespace, config: dict) -> tuple[VideoTransformer, VideoVAE]:
    """Transformer and VAE as shapes; every tensor that will be read is there, and the text model belongs to it."""
    with shapes_from(args.checkpoint_path):
        transformer = VideoTransformer(TransformerConfig.from_checkpoint(config["transformer"]))
        vae = VideoVAE(config["vae"])
    check_weights(transformer, args.checkpoint_path, TRANSFORMER_PREFIX)
    check_weights(vae, args.checkpoint_path, VAE_PREFIX)
    check_text(args.checkpoint_path, args.gemma_root)
    return transformer, vae


def check_paths(args: argparse.Namespace) -> None:
    out = args.output_path
    if out.suffix != ".mp4":
        raise ValueError(f"expected an output path ending in .mp4, got {out}; rename --output-path")
    if broken_text(str(out)):
        raise ValueError("expected an --output-path of ordinary characters, got bytes that are no text; choose another")
    if not out.parent.is_dir():
        raise ValueError(f"expected an existing output folder, got {out.parent}; create it")
    for target in (out, out.with_suffix(".png"), out.with_suffix(".json")):
        if target.is_dir() or target.resolve() == args.ref.resolve():
            raise ValueError(f"expected {target} to be free for the output, got a folder or the reference itself; "
                             "change --output-path")
    try:  # permission bits alone miss read-only disks, full ones, and names that are too long
        trial = temp_path(out)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(f"expected a writable folder, got {out.parent} ({error.strerror}); change --output-path") from error
    for name in ("config.json", "tokenizer.json"):
        if not (args.gemma_root / name).is_file():
            raise ValueError(f"expected {name} in the Gemma folder {args.gemma_root}, got none; check --gemma-root")
    for i, given in enumerate(args.lora):
        path, strength = (given + ["1"])[:2]
        if len(given) > 2 or not is_finite(strength):
            raise ValueError(f"expected --lora PATH [STRENGTH], got {' '.join(given)}; use for example 1.0")
        if not Path(path).is_file():
            raise ValueError(f"expected a LoRA file, got no file at {path}; check --lora")
        args.lora[i] = (path, float(strength))
    if args.lora and args.lora_mode == "applied" and args.offload != "none":
        raise ValueError("expected --lora-mode fused with --offload, got applied; leave one of them out")


def broken_text(text: str) -> bool:
    """Whether a word of the command line holds what no UTF-8 text can: lone surrogates, as Python keeps odd bytes."""
    return any("\ud800" <= char <= "\udfff" for char in text)


def is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def resolve_loras(args: argparse.Namespace, transformer: VideoTransformer, metadata: dict) -> None:
    """Check that the LoRAs fit, and settle where the reference goes: as the last trained of the files says."""
    said = {}  # what each LoRA was trained with
    for path, _ in args.lora:
        try:
            lora = read_lora(path, transformer)
        except ValueError as error:  # what the file is; what to do about it is another matter than for a checkpoint
            raise ValueError(f"{str(error).rpartition('; ')[0] or error}; check --lora {path}") from error
        if lora.audio_keys:
            print(f"note: {path} also holds {lora.audio_keys} tensors of the audio half, which is left out here")
        if "reference_placement" in lora.metadata:
            said[path] = lora.metadata["reference_placement"]
    if not said and "reference_placement" in metadata:
        said[args.checkpoint_path] = metadata["reference_placement"]
    for path, placement in said.items():
        reference_grid(1, 1, 1, placement)  # complains about a name it does not know
        wanted = args.placement or next(iter(said.values()))
        if placement != wanted and not args.force_placement:
            raise ValueError(f"expected --placement {placement} (as {path} was trained), got {wanted}; leave --placement "
                             "out, or add --force-placement to see what happens")
    if not said:
        warn("neither checkpoint nor LoRA says that it was trained with references; the face may be ignored")
    args.placement = args.placement or next(iter(said.values()), "tass")


def read_defaults(config: dict, path: Path) -> dict:
    """LTX-2.3's own numbers, replaced by what the checkpoint says under "inference"; each is a number, or some."""
    defaults = {**INFERENCE, **config.get("inference", {})}
    for name, official in INFERENCE.items():
        numbers = defaults[name] if isinstance(official, list) else [defaults[name]]
        numbers = [0] if numbers == [None] and official is None else numbers
        if not isinstance(numbers, list) or not numbers or any(type(number) not in (int, float) for number in numbers) \
                or (name == "guide_range" and len(numbers) != 2):
            raise ValueError(f"expected a number for {name} under 'inference' in the config of {path}, got "
                             f"{defaults[name]!r:.40}; use another checkpoint")
    return defaults


def resolve_numbers(args: argparse.Namespace, defaults: dict, vae: VideoVAE) -> None:
    steps = len(DISTILLED_SIGMAS) - 1 if args.distilled else defaults["steps"]
    if args.distilled and args.num_inference_steps not in (None, steps):
        raise ValueError(f"expected {steps} steps with --distilled, got {args.num_inference_steps}; "
                         "leave --num-inference-steps out")
    args.num_inference_steps = steps if args.num_inference_steps is None else args.num_inference_steps
    for name in ("height", "width", "num_frames", "frame_rate", "text_scale", "ref_scale", "rescale", "stg_scale",
                 "stg_blocks", "guide_range", "guide_every"):
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
    args.schedule_tokens = defaults["schedule_tokens"]
    for name, step, offset in (("height", vae.space_scale, 0), ("width", vae.space_scale, 0),
                               ("num_frames", vae.time_scale, 1)):
        value = getattr(args, name)
        lower = max((value - offset) // step, 1 - offset) * step + offset  # the largest legal size that is not above
        if value != lower:
            rule = f"a multiple of {step}" if offset == 0 else f"{step}*k + {offset}"
            near = f"{lower}" if value < lower else f"{lower} or {lower + step}"
            raise ValueError(f"expected --{name.replace('_', '-')} to be {rule}, got {value}; use {near}")
    check_ranges(args, {"height": (1, 10**6), "width": (1, 10**6), "num_frames": (1, 10**8), "frame_rate": (1, 240),
                        "num_inference_steps": (1, 10_000), "text_scale": (0, 1000), "ref_scale": (0, 1000),
                        "rescale": (0, 1), "stg_scale": (0, 1000), "guide_range": (0, 1), "phase_scale": (-1000, 1000),
                        "seed": (0, 2**63 - 1)})


def resolve_streams(args: argparse.Namespace, num_layers: int) -> None:
    """LTX-2.3: distilled weights were trained to give the guided result in one pass, so guidance would apply it twice."""
    if args.distilled:
        args.text_scale = args.ref_scale = 1.0
        args.rescale = args.stg_scale = 0.0
        args.guide_range, args.guide_every = [0.0, 1.0], 1
        print("note: --distilled runs one stream; --text-scale, --ref-scale, --rescale and --stg-scale have no effect")
    guidance_steps(torch.ones(2), args.guide_range, args.guide_every)  # complains about what it cannot do
    if args.stg_scale and (wrong := [block for block in args.stg_blocks if not 0 <= block < num_layers]):
        raise ValueError(f"expected --stg-blocks between 0 and {num_layers - 1}, got {wrong[0]}; choose another")


def check_memory(args: argparse.Namespace, config: dict, vae: VideoVAE) -> None:
    """Refuse a size that cannot fit before anything of it is allocated: the system would kill us without a word."""
    if args.device == "cuda":
        there = torch.cuda.get_device_properties(0).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    dtype = getattr(torch, args.dtype)
    least = plan.least_bytes(config, vae, latent_grid(args, vae), dtype, not args.no_tiling)
    part = max(least, key=least.get)
    if least[part] > there:
        raise ValueError(f"expected a size that fits, got {args.width}x{args.height}, {args.num_frames} frames: to {part} "
                         f"would take at least {plan.short(least[part], 'B')}, this machine has "
                         f"{plan.short(there, 'B')}; lower --width, --height or --num-frames")


def load_canvas(path: Path, height: int, width: int) -> Tensor:
    """The reference on a canvas of the video's size, (1, 3, h, w) in [-1, 1]."""
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise ValueError(f"expected a picture at {path}, got {got}; check --ref")
    try:
        image = open_picture(path)
        canvas = letterbox(image, height, width)[None]
    except (ValueError, OSError) as error:
        found = getattr(error, "detail", error)
        raise ValueError(f"expected a readable picture at {path}, got {found}; save it as PNG or JPEG, not huge") from error
    if min(image.size) < SMALL:
        warn(f"the reference has {image.width}x{image.height} pixels, too few to show a face")
    return canvas


def settings(args: argparse.Namespace) -> dict:
    """The resolved arguments and the weight of every stream that is run, as JSON can hold them."""
    weights = stream_weights(args.text_scale, args.ref_scale, args.order)
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "plan"}
    return values | {"streams": {STREAM_NAMES[stream]: weight for stream, weight in weights.items()}}


def warn(text: str) -> None:
    print(f"warning: {text}", flush=True)


def print_plan(args: argparse.Namespace) -> None:
    """What fits on which card (plan.py); without --checkpoint-path for the 22B model at its own defaults."""
    flags = ("height", "width", "num_frames", "text_scale", "ref_scale")
    given = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    plan.print_plan(args.checkpoint_path, args.gemma_root, order=args.order, **given)


def work(arguments: list[str] | None = None) -> None:
    """Read the command line, check everything, and do what was asked for."""
    start = time.perf_counter()
    parser = build_parser()
    args = parser.parse_args(arguments)
    if missing := [flag for flag in ("ref", "prompt") if getattr(args, flag) is None and not args.plan]:
        parser.error(f"the following arguments are required: {', '.join('--' + flag for flag in missing)}")
    torch.set_flush_denormal(True)  # denormal numbers can slow a CPU convolution tenfold
    reasons = {"device": "asked for" if args.device != "auto" else "found", "seed": "noise drawn on the CPU",
               "dtype": "asked for" if args.dtype != "auto" else "the device's default"}
    if args.plan:
        return print_plan(args)
    config, canvas = resolve(args)
    for name, reason in reasons.items():
        print(f"{name:8s}{getattr(args, name)} ({reason})")
    if args.dry_run:
        return print(*(f"  {name} = {value!r}" for name, value in settings(args).items()), sep="\n")
    with FastCPU():
        run(args, config, canvas)
    print(f"output  {args.output_path} (.png and .json beside it)\nseconds {time.perf_counter() - start:.1f}")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for what a user can mend, 130 and 143 after Ctrl-C and SIGTERM."""
    return command("sample.py", lambda: work(arguments), "no half-written file is left",
                   "lower --width, --height or --num-frames")


if __name__ == "__main__":
    sys.exit(main())
