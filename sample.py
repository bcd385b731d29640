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

A list of faces and prompts (--batch) goes through the same stages: each part is loaded once and
works for all of them. A latent that is not decoded yet is kept, so that a killed batch goes on.

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

from clips.batch import is_done, keep_latent, kept_latent, latent_path, read_batch
from clips.pictures import load_canvas
from clips.video import check_output, repeats, write_outputs
from common.cli import check_folder, command, warn
from common.files import sweep
from guidance import BOTH, NULL, REF, TEXT, Guidance, guidance_steps, guide, stream_weights
from losses import clean_estimate
from ltx import options, plan
from ltx.checkpoint import finite, read_metadata
from ltx.fast_cpu import FastCPU
from ltx.load import check_memory, check_parts, layout_from, load_transformer, read_inference
from ltx.lora import parse_loras
from ltx.text import TextEncoder, encode_once
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


def encode_prompts(args: argparse.Namespace, cases: list[argparse.Namespace]
                   ) -> list[Sequence[Tensor]]:
    """For each case the contexts of its prompt and of the negative prompt, (1, N, D) both."""
    parts = args.checkpoint_path, args.gemma_root, args.device, args.torch_dtype
    offload, encoder, contexts = args.offload_text or args.offload, None, []
    # One prompt through all parts, and not all prompts through one part after the other: Gemma's
    # states of a prompt take 400 MB until the next part has summed them up.
    if len(cases) > 1:
        encoder = TextEncoder.load(*parts, offload)
    for case in cases:
        # LTX-2.3: "null text" is the negative (or empty) prompt sent through the encoder, not
        # zeros. In pairs, as for a single video: another batch would round otherwise.
        prompts = [case.prompt, args.negative_prompt]
        if encoder is None:
            context, counts = encode_once(prompts, *parts, offload)               # (2, N, D)
        else:
            context = encoder.encode(prompts)                                     # (2, N, D)
            counts = [len(encoder.tokenizer.encode(prompt)) for prompt in prompts]
        for name, count in zip(("prompt", "negative prompt"), counts, strict=True):
            if count > context.shape[1]:
                warn(f"the {name} has {count} tokens, only the first {context.shape[1]} are read")
        finite(context, f"the text model in {args.gemma_root} and its connector")
        contexts.append(context.cpu().split(1))  # 8 MB each, which the card need not hold
    return contexts


def encode_faces(args: argparse.Namespace, cases: list[argparse.Namespace], floor: float | None
                 ) -> list[tuple[Tensor, float]]:
    """For each case its reference tokens (1, R, C) and how well the VAE redraws them, in dB."""
    vae = VideoVAE.load(args.checkpoint_path, args.device, args.torch_dtype)
    found = []
    for case in cases:
        picture = canvas_of(case)[None].to(args.device, args.torch_dtype)         # (1, 3, h, w)
        reference = finite(encode_reference(vae.encode, picture), "the VAE's encoder")  # (1, R, C)
        seen = vae.decode(unpatchify(reference, 1, args.layout.H, args.layout.W))
        finite(seen, "the VAE's decoder")                                 # (1, 3, 1, h, w)
        fidelity = psnr(seen[:, :, 0].float(), picture.float()).item()
        if floor is not None and fidelity < floor:  # a VAE that cannot redraw it never saw its kind
            warn(f"the reference survives encoding at {fidelity:.1f} dB, below {floor:g}: this "
                 "checkpoint only knows the procedural world's people, so the face will not be "
                 f"followed; {options.LTX23_FLAGS} load LTX-2.3")
        found.append((reference, fidelity))
    return found


def generate(args: argparse.Namespace, seeds: Sequence[int], contexts: Sequence[Sequence[Tensor]],
             references: Sequence[Tensor], bar: tqdm) -> Iterator[Tensor]:
    """For each case its latent video (1, C, F, H, W)."""
    transformer = load_transformer(args.checkpoint_path, args.device, args.torch_dtype, args.lora,
                                   args.quantization, args.offload)
    layout, tokens = args.layout, args.layout.F * args.layout.H * args.layout.W
    sigmas = ltx_sigmas(args.num_inference_steps, args.schedule_tokens)
    if args.distilled:
        sigmas = torch.tensor(DISTILLED_SIGMAS)
    for seed, pair, reference in zip(seeds, contexts, references, strict=True):
        # drawn on the CPU: a seed means the same noise on every device
        g = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, tokens, transformer.config.in_channels, generator=g).to(args.device)
        pair = [context.to(args.device) for context in pair]
        for step in denoise_steps(transformer, noise, sigmas, *pair, reference, layout,
                                  args.guidance):
            x, _ = step                                                   # (1, L, C)
            bar.update()
        yield unpatchify(x, layout.F, layout.H, layout.W)


def decode(vae: VideoVAE, latent: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Runs of finished frames (3, f, h, w), each made when it is asked for."""
    for frames in vae.decode_tiles(latent.to(dtype)):                     # (1, 3, f, h, w)
        frames = frames[0]                                                # (3, f, h, w)
        yield frames
        del frames  # before the next tile needs the room


def write(args: argparse.Namespace, case: argparse.Namespace, frames: Iterator[Tensor],
          fidelity: float, seconds: dict[str, float]) -> None:
    """The video of a case, its picture and its record; frames are made as they are written."""
    packages = ("torch", "safetensors", "numpy", "pillow", "av")
    versions = {name: importlib.metadata.version(name) for name in packages}
    record = {"arguments": settings(case), "seed": case.seed, "device": args.device,
              "dtype": args.dtype, "versions": {"python": sys.version.split()[0], **versions},
              "reference_psnr_db": round(fidelity, 2), "seconds": seconds}
    write_outputs(case.output_path, frames, args.num_frames, canvas_of(case), args.frame_rate,
                  record, args.times)


@torch.no_grad()
def run(args: argparse.Namespace, cases: list[argparse.Namespace], floor: float | None) -> None:
    """Text, reference, denoising, decoding and files, one after the other for all cases: only one
    part's weights are loaded at a time. args and cases from `resolve`."""
    seconds: dict[str, float] = {}  # of all cases together
    latents = {}  # by seed: latent (1, C, F, H, W) and the reference's dB
    for case in cases if args.batch else ():  # what a killed batch had made, but not decoded
        if found := kept_latent(case.output_path, settings(case)):
            latents[case.seed] = found
    steps, waiting = args.num_inference_steps, len(latents)
    if fresh := [case for case in cases if case.seed not in latents]:
        # Gemma is the largest part; it is gone before the transformer is loaded
        with stage("text", seconds, args.device):
            contexts = encode_prompts(args, fresh)                        # (1, N, D) each
        with stage("reference", seconds, args.device):
            faces = encode_faces(args, fresh, floor)                      # (1, R, C) each
    title = ", ".join(STREAM_NAMES[stream] for stream in stream_weights(args.guidance))
    with tqdm(None, f"denoise [{title}]", len(cases) * steps, initial=waiting * steps,
              unit="step") as bar:
        if fresh:
            with stage("denoise", seconds, args.device):
                made = generate(args, [case.seed for case in fresh], contexts,
                                [reference for reference, _ in faces], bar)
                for case, (_, fidelity), latent in zip(fresh, faces, made, strict=True):
                    latents[case.seed] = latent.cpu(), fidelity
                    if args.batch:  # hours of denoising, before the first of them is decoded
                        keep_latent(case.output_path, settings(case), *latents[case.seed])
        with stage("decode", seconds, args.device):
            vae = VideoVAE.load(args.checkpoint_path, args.device, args.torch_dtype)
        for case in cases:
            bar.set_description(f"decode {case.output_path.name}")
            latent, fidelity = latents.pop(case.seed)  # a hundred cases need not wait in memory
            # nothing is decoded yet: tiles are made as they are written
            frames = decode(vae, latent.to(args.device), args.torch_dtype)
            write(args, case, frames, fidelity, dict(seconds))
            latent_path(case.output_path).unlink(missing_ok=True)


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


def canvas_of(case: argparse.Namespace) -> Tensor:
    """The reference of a case at the video's size, (3, h, w)."""
    return load_canvas(case.ref, case.height, case.width, case.canvas == "crop")


def list_cases(args: argparse.Namespace) -> list[argparse.Namespace]:
    """One case, or those of --batch: the same arguments with ref, prompt, seed and output of each.
    """
    if not args.batch:
        return [args]
    check_folder(args.output_folder)
    told = vars(args)  # a seed of its own for each: equal noise would make equal poses
    return [argparse.Namespace(**told | {"ref": row.img, "prompt": row.prompt,
                                         "seed": args.seed + row.number - 1,
                                         "output_path": row.video(args.output_folder)})
            for row in read_batch(args.batch)]


def resolve(args: argparse.Namespace) -> tuple[list[argparse.Namespace], float | None]:
    """Fill in every default and check all that can be checked without reading weights.

    Returns the cases, and the PSNR below which the VAE does not know a reference. Raises ValueError
    on the first mistake.
    """
    cases = list_cases(args)
    if not args.batch:
        check_output(args.output_path, args.ref)  # first: a mistake must not cost an hour
    args.lora = parse_loras(args.lora)
    config = read_metadata(args.checkpoint_path)["config"]
    transformer, vae = check_parts(args.checkpoint_path, args.gemma_root)
    options.resolve_placement(args, transformer)
    defaults = read_inference(config, args.checkpoint_path)
    options.resolve_numbers(args, defaults)
    args.layout = layout_from(vars(args), vae, args.placement)
    options.check_numbers(args, transformer.config.num_layers)
    args.times = repeats(args.num_frames, args.frame_rate, args.loop_seconds)
    options.resolve_machine(args)
    check_memory(config, vae, args.layout, args.torch_dtype, args.device)
    own = ("ref", "prompt", "seed", "output_path")
    for case in cases:  # what was resolved holds for all but these
        vars(case).update({k: v for k, v in vars(args).items() if k not in own})
        case.prompt = options.prefixed(case.prompt, args.preset)
        canvas_of(case)  # refuses or warns now
    words = argparse.Namespace(**vars(args) | {"prompt": " ".join(case.prompt for case in cases)})
    options.warn_of_surprises(words, config, defaults, min(transformer.config.max_pos[1:]))
    return cases, defaults["reference_psnr_floor"]


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
    if args.batch and (args.ref or args.prompt):
        parser.error("--batch names pictures and prompts; leave --ref and --prompt out")
    wanted = ("batch", "output_folder") if args.batch or args.output_folder else ("ref", "prompt")
    if missing := [flag.replace("_", "-") for flag in wanted if getattr(args, flag) is None]:
        parser.error("the following arguments are required: --" + ", --".join(missing))
    torch.set_flush_denormal(True)  # denormal numbers can slow a CPU convolution tenfold
    cases, floor = resolve(args)
    if args.dry_run:
        return print(*(f"  {name} = {value!r}" for name, value in settings(args).items()), sep="\n")
    if args.batch:
        args.output_folder.mkdir(parents=True, exist_ok=True)
        sweep(args.output_folder)  # what a killed process was writing
        left = [case for case in cases if not is_done(case.output_path, settings(case))]
        print(f"cases   {len(cases)}, {len(cases) - len(left)} of them there already, seeds "
              f"{cases[0].seed} to {cases[-1].seed}")
        cases = left
    if cases:
        with FastCPU():
            run(args, cases, floor)
    told = ".png and .json beside it"
    if args.times > 1:  # --loop-seconds
        told = f"{args.num_frames / args.frame_rate:.1f} s written {args.times} times over; {told}"
    print(f"output  {args.output_folder or args.output_path} ({told})\n"
          f"seconds {time.perf_counter() - start:.1f}")


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, 2 for what a user can mend, 130 and 143 after Ctrl-C and SIGTERM."""
    return command("sample.py", lambda: work(arguments), "no half-written file is left",
                   "lower --width, --height or --num-frames")


if __name__ == "__main__":
    sys.exit(main())
