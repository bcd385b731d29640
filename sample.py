"""Sampling: a face and a prompt become an mp4.

The idea. Here the paper's inference happens. The reference's tokens join the noisy video tokens,
clean, at their TASS positions (reference.py, rope.py); the model is asked with and without them
and with and without the prompt; the streams are summed (guidance.py); one Euler step follows. Two
mistakes that look harmless: a reference that is denoised along drifts away from the face, and a
"stream without reference" made of zeros still sees a picture, a grey one. So the reference is
appended anew in every call, and absent where it must not be seen.

    python sample.py --ref examples/ada.png --prompt "a person in a red shirt turns left in a park"

paper:       a reference picture and a prompt in, a video of that person out; reference tokens
             beside the video tokens, three streams, the reference never decoded (ST-DRC, arXiv
             2606.02441, abstract and figure).
LTX-2.3:     Euler steps on the clean estimate in float32; noise schedule, sizes, steps, text scale.
our reading: the order of guidance and its scales; --rescale measures the spread on the video
             tokens only, because the streams have unequal numbers of tokens.

Conventions. Sigma 1 = noise, 0 = data. Scales: 1 = not amplified; --ref-scale 0 = no face
(text_first); --rescale 0, --guide-range 0 1 and --guide-every 1 = off. What the checkpoint's
config says under "inference" is the default, otherwise LTX-2.3's own numbers: the small bundled
model and the 22B model take one path. Noise is drawn on the CPU: a seed means the same noise on
every device.

Read next: train.py
"""

import argparse
import importlib.metadata
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clips.frames import load_canvas
from clips.video import check_output, write_outputs
from common.cli import command, warn
from guidance import BOTH, NULL, REF, TEXT, Guidance, guidance_steps, guide, stream_weights
from losses import clean_estimate
from ltx import options, plan
from ltx.checkpoint import finite, read_metadata
from ltx.fast_cpu import FastCPU
from ltx.load import check_memory, check_parts, layout_from, load_transformer, read_inference
from ltx.lora import parse_loras
from ltx.text import encode_once
from ltx.vae import VideoVAE, psnr
from model import DISTILLED_SIGMAS, euler_step, ltx_sigmas
from reference import Reference, encode_reference, predict_velocity, unpatchify
from rope import Layout

STREAM_NAMES = {NULL: "null", TEXT: "text", REF: "face", BOTH: "text+face"}


# ------------------------------------------------------------ the sampling loop


@torch.no_grad()
def denoise_steps(
    model: nn.Module,
    noise: Tensor,
    sigmas: Tensor,
    context: Tensor,
    null_context: Tensor,
    reference_tokens: Tensor | None,
    layout: Layout,
    guidance: Guidance,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Noise -> video tokens, step by step: yields the tokens and their clean estimate, (B, L, C).

    paper: three streams over the video tokens, with and without the appended reference. LTX-2.3:
    Euler steps on x0. noise (B, L, C); sigmas (steps + 1,) falling to 0; context, null_context
    (B, N, D) or (1, N, D); reference_tokens (B, R, C) with R = H*W, or None for text only.
    A sample does not depend on its neighbours in the batch unless guidance.rescale > 0 (LTX-2.3:
    one spread for the batch). Raises ValueError, naming the step, when an estimate is not finite.
    """
    B, steps = len(noise), len(sigmas) - 1
    # Positions are the same in every step; the video's do not know of the reference.
    positions, reference = layout.video_positions().to(noise.device), None        # (A, L, 2)
    if reference_tokens is None:
        guidance = replace(guidance, order="text_first", ref_scale=0.0)  # ordinary text guidance
    else:
        reference = Reference(reference_tokens, layout.reference_positions())
    # by whether the prompt is seen: (B, N, D) each
    contexts = {True: context.expand(B, -1, -1), False: null_context.expand(B, -1, -1)}

    def estimate(x, sigma, text, ref, skip_blocks=()):  # one stream: what the model believes in
        shown = reference if ref else None  # absent, not zero
        v = predict_velocity(model, x, sigma, positions, contexts[text], shown,
                             skip_blocks=skip_blocks)                     # (B, L, C)
        return clean_estimate(x, v, sigma)                                # (B, L, C) float32

    # float32: small steps in bfloat16 would lose what they add
    x, deltas = noise.to(torch.float32), {}                               # (B, L, C)
    for i, what in enumerate(guidance_steps(sigmas, guidance)):
        stream = partial(estimate, x, sigmas[i].to(x.device).expand(B))
        if what == "all":
            deltas.clear()  # and made anew by guide
        if what == "one":  # all conditions whose scale is not 0, none amplified
            x0 = stream(guidance.text_scale != 0, guidance.ref_scale != 0)        # (B, L, C)
        else:
            x0 = guide(stream, guidance, deltas if guidance.every > 1 else None)  # (B, L, C)
        finite(x0, f"step {i + 1} of {steps}", "use --dtype float32 or lower the scales")
        x = euler_step(x, x0, sigmas[i], sigmas[i + 1])                   # (B, L, C)
        yield x, x0


def denoise(
    model: nn.Module,
    noise: Tensor,
    sigmas: Tensor,
    context: Tensor,
    null_context: Tensor,
    reference_tokens: Tensor | None,
    layout: Layout,
    guidance: Guidance,
) -> Tensor:
    """`denoise_steps` to the end: the latent video (B, C, F, H, W), float32."""
    steps = denoise_steps(model, noise, sigmas, context, null_context, reference_tokens, layout,
                          guidance)
    x, _ = deque(steps, maxlen=1).pop()  # runs them all, keeps the last: (B, L, C)
    return unpatchify(x, layout.F, layout.H, layout.W)


# ------------------------------------------------------------ stages: each loads, works, and frees


def encode_prompts(args: argparse.Namespace) -> Sequence[Tensor]:
    """Contexts of the prompt and of the negative prompt, (1, N, D) each."""
    # LTX-2.3: "null text" is the negative (or empty) prompt sent through the encoder, not zeros.
    context, counts = encode_once([args.prompt, args.negative_prompt], args.checkpoint_path,
                                  args.gemma_root, args.device, args.torch_dtype,
                                  args.offload_text or args.offload)      # (2, N, D)
    for name, count in zip(("prompt", "negative prompt"), counts, strict=True):
        if count > context.shape[1]:
            warn(f"the {name} has {count} tokens, only the first {context.shape[1]} are read")
    finite(context, f"the text model in {args.gemma_root} and its connector")
    return context.split(1)


def encode_face(args: argparse.Namespace, canvas: Tensor, floor: float | None
                ) -> tuple[Tensor, float]:
    """Reference tokens (1, R, C) and how well the VAE redraws them, in dB."""
    vae = VideoVAE.load(args.checkpoint_path, args.device, args.torch_dtype)
    picture = canvas.to(args.device, args.torch_dtype)                    # (1, 3, h, w)
    reference = finite(encode_reference(vae.encode, picture), "the VAE's encoder")      # (1, R, C)
    seen = vae.decode(unpatchify(reference, 1, args.layout.H, args.layout.W))
    finite(seen, "the VAE's decoder")                                     # (1, 3, 1, h, w)
    fidelity = psnr(seen[:, :, 0].float(), picture.float()).item()
    if floor is not None and fidelity < floor:  # a VAE that cannot redraw it never saw its kind
        warn(f"the reference survives encoding at {fidelity:.1f} dB, below {floor:g}: this "
             "checkpoint only knows the procedural world's people, so the face will not be "
             f"followed; {options.LTX23_FLAGS} load LTX-2.3")
    return reference, fidelity


def generate(args: argparse.Namespace, contexts: Sequence[Tensor], reference: Tensor) -> Tensor:
    """Latent video (1, C, F, H, W)."""
    transformer = load_transformer(args.checkpoint_path, args.device, args.torch_dtype, args.lora,
                                   args.quantization, args.offload)
    layout, g = args.layout, torch.Generator().manual_seed(args.seed)
    tokens = layout.F * layout.H * layout.W
    # drawn on the CPU: a seed means the same noise on every device
    noise = torch.randn(1, tokens, transformer.config.in_channels, generator=g).to(args.device)
    steps, names = args.num_inference_steps, stream_weights(args.guidance)
    sigmas = ltx_sigmas(steps, args.schedule_tokens)
    if args.distilled:
        sigmas = torch.tensor(DISTILLED_SIGMAS)
    walk = denoise_steps(transformer, noise, sigmas, *contexts, reference, layout, args.guidance)
    title = f"denoise [{', '.join(STREAM_NAMES[stream] for stream in names)}]"
    x, _ = deque(tqdm(walk, title, steps, unit="step"), maxlen=1).pop()   # (1, L, C)
    return unpatchify(x, layout.F, layout.H, layout.W)


def decode(args: argparse.Namespace, latent: Tensor) -> Iterator[Tensor]:
    """Runs of finished frames (3, f, h, w), each made when it is asked for."""
    vae = VideoVAE.load(args.checkpoint_path, args.device, args.torch_dtype)
    for frames in vae.decode_tiles(latent.to(args.torch_dtype)):          # (1, 3, f, h, w)
        frames = frames[0]                                                # (3, f, h, w)
        yield frames
        del frames  # before the next tile needs the room


@torch.no_grad()
def run(args: argparse.Namespace, canvas: Tensor, floor: float | None) -> None:
    """Text, reference, denoising, decoding and files, one after the other: only one part's
    weights are loaded at a time. args from `resolve`, canvas (1, 3, h, w)."""
    seconds: dict[str, float] = {}
    with stage("text", seconds, args.device):
        contexts = encode_prompts(args)                                   # (1, N, D) each
    with stage("reference", seconds, args.device):
        reference, fidelity = encode_face(args, canvas, floor)            # (1, R, C)
    with stage("denoise", seconds, args.device):
        latent = generate(args, contexts, reference)                      # (1, C, F, H, W)
    packages = ("torch", "safetensors", "numpy", "pillow", "av")
    versions = {name: importlib.metadata.version(name) for name in packages}
    record = {"arguments": settings(args), "seed": args.seed, "device": args.device,
              "dtype": args.dtype, "versions": {"python": sys.version.split()[0], **versions},
              "reference_psnr_db": round(fidelity, 2), "seconds": seconds}
    frames = decode(args, latent)  # nothing is decoded yet: tiles are made as they are written
    write_outputs(args.output_path, frames, args.num_frames, canvas[0], args.frame_rate, record)


@contextmanager
def stage(name: str, seconds: dict[str, float], device: str) -> Iterator[None]:
    """Times what happens inside, and gives a card's memory back."""
    start = time.perf_counter()
    yield
    if device == "cuda":
        torch.cuda.synchronize()  # otherwise the clock stops before the work does
        torch.cuda.empty_cache()
        torch.accelerator.empty_host_cache()  # page-locked memory, which PyTorch would keep
    seconds[name] = round(time.perf_counter() - start, 2)


# ------------------------------------------------------------ what was asked for (ltx/options.py)


def resolve(args: argparse.Namespace) -> tuple[Tensor, float | None]:
    """Fill in every default and check all that can be checked without reading weights.

    Returns the letterboxed reference (1, 3, h, w), and the PSNR below which the VAE does not know
    it. Raises ValueError on the first mistake.
    """
    check_output(args.output_path, args.ref)  # first: a spelling mistake must not cost an hour
    args.lora = parse_loras(args.lora)
    config = read_metadata(args.checkpoint_path)["config"]
    transformer, vae = check_parts(args.checkpoint_path, args.gemma_root)
    options.resolve_placement(args, transformer)
    defaults = read_inference(config, args.checkpoint_path)
    options.resolve_numbers(args, defaults)
    args.layout = layout_from(vars(args), vae, args.placement)
    options.check_numbers(args, transformer.config.num_layers)
    options.resolve_machine(args)
    check_memory(config, vae, args.layout, args.torch_dtype, args.device)
    canvas = load_canvas(args.ref, args.height, args.width)[None]
    options.warn_of_surprises(args, config, defaults, min(transformer.config.max_pos[1:]))
    return canvas, defaults["reference_psnr_floor"]


def settings(args: argparse.Namespace) -> dict:
    """The resolved arguments and the weight of every stream that is run, as JSON can hold them."""
    values = vars(args) | {"layout": asdict(args.layout), "guidance": asdict(args.guidance)}
    del values["plan"], values["tflops"], values["torch_dtype"]
    weights = {STREAM_NAMES[s]: weight for s, weight in stream_weights(args.guidance).items()}
    values = {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
    return values | {"streams": weights}


def work(arguments: list[str] | None = None) -> None:
    """Read the command line, check everything, and do what was asked for."""
    start = time.perf_counter()
    parser = options.build_parser()
    args = parser.parse_args(arguments)
    if args.plan:
        return plan.print_plan(args)
    if missing := [flag for flag in ("ref", "prompt") if getattr(args, flag) is None]:
        parser.error("the following arguments are required: --" + ", --".join(missing))
    torch.set_flush_denormal(True)  # denormal numbers can slow a CPU convolution tenfold
    canvas, floor = resolve(args)
    if args.dry_run:
        return print(*(f"  {name} = {value!r}" for name, value in settings(args).items()), sep="\n")
    with FastCPU():
        run(args, canvas, floor)
    print(f"output  {args.output_path} (.png and .json beside it)\n"
          f"seconds {time.perf_counter() - start:.1f}")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for what a user can mend, 130 and 143 after Ctrl-C and SIGTERM."""
    return command("sample.py", lambda: work(arguments), "no half-written file is left",
                   "lower --width, --height or --num-frames")


if __name__ == "__main__":
    sys.exit(main())
