"""A face and a prompt in, a video out: the main job, end to end.

    prompt --text.py--> context ---------------------------------.
    face --letterbox--> canvas --vae.py--> reference tokens ------+--> model.py, step by step --vae.py--> out.mp4
    seed --> noise ----------------------------------------------'

The idea. Every part of ST-DRC (arXiv 2606.02441) has its own file; here they meet, in the order in which data passes
through them. `denoise` is the paper's inference: reference tokens appended clean to the noisy video tokens at their
TASS positions, three streams combined by guidance, one Euler step, and the reference dropped before decoding. Without
this care a reference that is denoised along drifts away from the face, and a "stream without reference" that is made
of zeros still sees a picture, a grey one.

paper:       reference tokens beside the video tokens; three streams; the reference is never decoded (abstract, figure).
LTX-2.3:     noise schedule, Euler step, estimates x0 = x - sigma * v in float32, default sizes and text scale.
our reading: order of guidance and its scales (guidance.py). --rescale measures the spread on the video tokens only,
             because the streams have unequal numbers of tokens.

Conventions. Scales: 1 = plain conditional prediction, 0 = condition absent; --rescale 0 = off. Sigma 1 = noise, 0 =
data. What the checkpoint's config says under "inference" (size, steps, scales) is the default, otherwise LTX-2.3's own
numbers: the small bundled model and the 22B model take the same path. Noise is drawn on the CPU, so a seed means the
same noise on every device. Beside out.mp4 stand out.png (reference and frames) and out.json (what to repeat it with).

    latent = denoise(transformer, context, null_context, reference_tokens, (F, H, W), 24.0, (8, 32), sigmas, noise)
    video = vae.decode(latent)                                                # (B, C, F, H, W) -> (B, 3, f, h, w)

Read next: evaluate.py
"""

import argparse
import importlib.metadata
import json
import math
import os
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import load_weights, read_metadata
from guidance import BOTH, NULL, ORDERS, REF, TEXT, guide, stream_weights
from lora import load_lora
from losses import clean_estimate
from model import TransformerConfig, VideoTransformer, euler_step, ltx_sigmas
from reference import append_reference, drop_reference, encode_reference, letterbox, unpatchify
from rope import PLACEMENTS, grid_to_positions, reference_grid, video_grid
from text import TextEncoder
from vae import VideoVAE, psnr

TINY = Path(__file__).resolve().parent / "weights" / "tiny"
# LTX-2.3: the official defaults; ref_scale is ours. A checkpoint's config["inference"] replaces any of them.
INFERENCE = {"width": 768, "height": 512, "num_frames": 121, "frame_rate": 24.0, "steps": 30, "text_scale": 3.0,
             "ref_scale": 2.0, "rescale": 0.0, "schedule_tokens": 4096, "reference_psnr_floor": None}
STREAM_NAMES = {NULL: "null", TEXT: "text", REF: "face", BOTH: "text+face"}
LTX23_COMMAND = "--checkpoint-path ltx-2.3-22b-dev.safetensors --gemma-root gemma-3-12b-it-qat-q4_0-unquantized"
EXAMPLES = f"""
examples:
  python sample.py --ref examples/ada.png --prompt "a person in a red shirt turns left in a park, in daylight"
  python sample.py --ref face.jpg --prompt "A woman of about 60 with grey hair laughs in the rain." \\
      {LTX23_COMMAND} --lora st-drc.safetensors
"""


# ------------------------------------------------------------ the method
@torch.no_grad()
def denoise(transformer: nn.Module, context: Tensor, null_context: Tensor, reference_tokens: Tensor | None,
            grid: tuple[int, int, int], frame_rate: float, scales: tuple[int, int], sigmas: Tensor, noise: Tensor,
            text_scale: float = 3.0, ref_scale: float = 2.0, order: str = "text_first", rescale: float = 0.0,
            placement: str = "tass", progress: bool = False) -> Tensor:
    """Noise -> latent video (B, C, F, H, W), float32, for a whole batch at once.

    paper: three streams over video tokens with and without the appended reference. LTX-2.3: Euler steps on x0.
    context, null_context (B, N, D) or (1, N, D); reference_tokens (B, R, C) with R = H*W, or None for text only; grid
    (F, H, W) in latent cells; scales (time_scale, space_scale) of the VAE; sigmas (steps + 1,) falling to 0; noise
    (B, F*H*W, C). A stream without reference has no reference tokens at all; a stream of weight 0 is not run.
    A sample does not depend on its neighbours in the batch unless rescale > 0 (LTX-2.3: one spread for the batch).
    Raises ValueError when an estimate is not finite, naming the step.
    """
    B, L, _ = noise.shape
    if reference_tokens is None:
        order, ref_scale = "text_first", 0.0  # what is left is ordinary text guidance
    video = grid_to_positions(video_grid(*grid), frame_rate, *scales).to(noise.device).expand(B, 3, L, 2)
    beside = grid_to_positions(reference_grid(*grid, placement), frame_rate, *scales)     # (3, R, 2)
    contexts = {True: context.expand(B, -1, -1), False: null_context.expand(B, -1, -1)}   # (B, N, D) each
    names = ", ".join(STREAM_NAMES[stream] for stream in stream_weights(text_scale, ref_scale, order))

    x, steps = noise.to(torch.float32), len(sigmas) - 1
    for i in tqdm(range(steps), desc=f"denoise [{names}]", unit="step", disable=not progress):
        sigma = sigmas[i].to(noise.device).expand(B)                                      # (B,)

        def predict(text: bool, ref: bool, x: Tensor = x, sigma: Tensor = sigma) -> Tensor:
            tokens, timesteps, positions = x, sigma[:, None].expand(B, L), video
            if ref:
                tokens, timesteps, positions = append_reference(tokens, timesteps, positions, reference_tokens, beside)
            velocity = transformer(tokens, timesteps, sigma, positions, contexts[text])   # (B, L or S, C)
            return clean_estimate(x, drop_reference(velocity, L), sigma)                  # (B, L, C) float32

        x0 = guide(predict, text_scale, ref_scale, order, rescale)                        # (B, L, C)
        if not x0.isfinite().all():
            raise ValueError(f"expected finite latents, got NaN or infinity at step {i + 1} of {steps}; "
                             "use --dtype float32 or lower the scales")
        x = euler_step(x, x0, sigmas[i], sigmas[i + 1])
    return unpatchify(x, *grid)


def encode_prompts(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Contexts of the prompt and of the negative prompt, (1, N, D) each. The text encoder is freed on return."""
    encoder = TextEncoder.load(args.checkpoint_path, args.gemma_root, device, dtype)
    if (words := len(encoder.tokenizer.encode(args.prompt))) > encoder.length:
        warn(f"the prompt has {words} tokens, only the first {encoder.length} are read")
    # LTX-2.3: "null text" is the negative (or empty) prompt sent through the encoder, not a context of zeros.
    return encoder.encode([args.prompt, args.negative_prompt]).split(1)


@torch.no_grad()
def run(args: argparse.Namespace, config: dict, canvas: Tensor) -> None:
    """Text, reference, denoising, decoding, files: one after the other. args from `resolve`, canvas (1, 3, h, w)."""
    seconds: dict[str, float] = {}
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    with stage("text", seconds, device):
        context, null_context = encode_prompts(args, device, dtype)

    with stage("reference", seconds, device):
        with torch.device("meta"):
            vae = VideoVAE(config["vae"])
        load_weights(vae, args.checkpoint_path, "vae.", dtype, device)
        picture = canvas.to(device, dtype)                                                # (1, 3, h, w)
        reference = encode_reference(vae.encode, picture)                                 # (1, R, C)
        seen = vae.decode(unpatchify(reference, 1, args.height // vae.space_scale, args.width // vae.space_scale))
        fidelity = psnr(seen[:, :, 0].float(), picture.float()).item()
    floor = config.get("inference", {}).get("reference_psnr_floor")
    if floor is not None and fidelity < floor:  # a VAE that cannot redraw a picture has never seen its kind
        warn(f"the reference survives encoding at {fidelity:.1f} dB, below {floor:g}: this checkpoint only knows the "
             f"procedural world's people, so the face will not be followed; {LTX23_COMMAND} load LTX-2.3")

    with stage("denoise", seconds, device):
        with torch.device("meta"):
            transformer = VideoTransformer(TransformerConfig.from_checkpoint(config["transformer"]))
        load_weights(transformer, args.checkpoint_path, "model.diffusion_model.", dtype, device).eval()
        if args.lora:
            load_lora(transformer, *args.lora)
        scales = (vae.time_scale, vae.space_scale)
        grid = ((args.num_frames - 1) // scales[0] + 1, args.height // scales[1], args.width // scales[1])
        generator = torch.Generator().manual_seed(args.seed)
        noise = torch.randn(1, math.prod(grid), vae.latent_channels, generator=generator).to(device)
        sigmas = ltx_sigmas(args.num_inference_steps, args.schedule_tokens)
        latent = denoise(transformer, context, null_context, reference, grid, args.frame_rate, scales, sigmas, noise,
                         args.text_scale, args.ref_scale, args.order, args.rescale, args.placement, progress=True)
        del transformer  # before decoding, which needs the room

    with stage("decode", seconds, device):
        video = vae.decode(latent.to(dtype))[0].float().cpu()                             # (3, F, h, w)
        if not video.isfinite().all():
            raise ValueError("expected finite pixels, got NaN or infinity after decoding; use --dtype float32")
    packages = ("torch", "safetensors", "numpy", "pillow", "av")
    record = {"arguments": settings(args), "seed": args.seed, "device": args.device, "dtype": args.dtype,
              "versions": {"python": sys.version.split()[0], **{p: importlib.metadata.version(p) for p in packages}},
              "reference_psnr_db": round(fidelity, 2), "seconds": seconds}
    write_outputs(args.output_path, video, canvas[0], args.frame_rate, record)


@contextmanager
def stage(name: str, seconds: dict[str, float], device: torch.device):
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize()  # otherwise the clock stops before the work does
        torch.cuda.empty_cache()
    seconds[name] = round(time.perf_counter() - start, 2)


# ------------------------------------------------------------ files
def to_frames(video: Tensor, factor: int) -> np.ndarray:
    """(3, F, h, w) in [-1, 1] -> (F, h*factor, w*factor, 3) uint8, enlarged bicubically."""
    frames = video.transpose(0, 1)                                                        # (F, 3, h, w)
    if factor > 1:
        frames = nn.functional.interpolate(frames, scale_factor=factor, mode="bicubic")
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def write_video(path: Path, frames: np.ndarray, frame_rate: float) -> None:
    """frames (F, h, w, 3) uint8 -> H.264 in an mp4 that any browser plays."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        rate = Fraction(frame_rate).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"crf": "14"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1  # x264 notes the number of threads in the file: same seed, same bytes
        # Players guess the colour matrix when it is not said, and skin turns pink or green.
        stream.codec_context.colorspace = av.video.reformatter.Colorspace.ITU709
        stream.codec_context.color_range = av.video.reformatter.ColorRange.MPEG
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def contact_sheet(reference: np.ndarray, frames: np.ndarray) -> Image.Image:
    """The reference (h, w, 3) beside up to five evenly spaced frames, thin grey gaps between."""
    picks = np.linspace(0, len(frames) - 1, min(5, len(frames))).round().astype(int)
    gap = np.full((len(reference), 4, 3), 128, np.uint8)
    return Image.fromarray(np.concatenate([reference] + [part for i in picks for part in (gap, frames[i])], axis=1))


def write_outputs(path: Path, video: Tensor, canvas: Tensor, frame_rate: float, record: dict) -> None:
    """mp4, png and json, written beside their places and renamed at the very end, so that no half file is ever seen.

    Small videos are enlarged by a whole factor to a shorter side of at least 384, the longer one up to 4096.
    """
    start, (h, w) = time.perf_counter(), video.shape[-2:]
    factor = max(1, min(math.ceil(384 / min(h, w)), 4096 // max(h, w)))
    frames = to_frames(video, factor)
    targets = [path, path.with_suffix(".png"), path.with_suffix(".json")]
    beside = [p.with_name(f".{p.stem}.{os.getpid()}{p.suffix}") for p in targets]
    try:
        write_video(beside[0], frames, frame_rate)
        contact_sheet(to_frames(canvas[:, None], factor)[0], frames).save(beside[1])
        record |= {"model_size": [len(frames), h, w], "output_size": list(frames.shape[:3]), "enlarged": factor,
                   "files": [target.name for target in targets]}
        record["seconds"]["write"] = round(time.perf_counter() - start, 2)
        beside[2].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for temporary, target in zip(beside, targets, strict=True):
            os.replace(temporary, target)
    finally:
        for temporary in beside:
            temporary.unlink(missing_ok=True)


# ------------------------------------------------------------ what the user asked for, checked before any heavy work
class Parser(argparse.ArgumentParser):
    """One line per mistake; argparse alone prints the whole usage first."""

    def error(self, message: str) -> None:
        self.exit(2, f"sample.py: error: {message}; see sample.py --help\n")


def build_parser() -> Parser:
    parser = Parser("sample.py", description="A face and a prompt in, a video of that person out (ST-DRC on LTX-2.3).",
                    epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add, known = parser.add_argument, {k: f"(default: the checkpoint's, else {v})" for k, v in INFERENCE.items()}
    add("--ref", type=Path, required=True, metavar="PICTURE", help="the face, any format and size (required)")
    add("--prompt", required=True, help="what happens, beginning with a description of the person (required)")
    add("--negative-prompt", default="", help="what to steer away from (default: empty)")
    add("--checkpoint-path", type=Path, default=TINY / "model.safetensors", help="(default: %(default)s)")
    add("--gemma-root", type=Path, default=TINY / "gemma", help="folder of the text model (default: %(default)s)")
    add("--lora", nargs="+", metavar=("PATH", "STRENGTH"), help="LoRA file and strength (default: none, strength 1)")
    add("--output-path", type=Path, default=Path("out.mp4"), help="(default: %(default)s; .png and .json beside it)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--height", type=int, help=f"pixels {known['height']}")
    add("--width", type=int, help=f"pixels {known['width']}")
    add("--num-frames", type=int, help=known["num_frames"])
    add("--frame-rate", type=float, help=f"frames per second, 1 to 240 {known['frame_rate']}")
    add("--num-inference-steps", type=int, help=known["steps"])
    add("--text-scale", type=float, help=f"1 = prompt not amplified {known['text_scale']}")
    add("--ref-scale", type=float, help=f"1 = face not amplified, 0 = no face {known['ref_scale']}")
    add("--rescale", type=float, help=f"0 = off, 0.7 calms burnt colours {known['rescale']}")
    add("--order", choices=ORDERS, default=ORDERS[0], help="how the streams are summed (default: %(default)s)")
    add("--placement", choices=sorted(PLACEMENTS), help="reference positions (default: as trained, else tass)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="(default: float32 on CPU, else bf16)")
    add("--dry-run", action="store_true", help="check everything, print the settings, write nothing (default: off)")
    return parser


def resolve(args: argparse.Namespace) -> tuple[dict, Tensor]:
    """Fill in every default and check everything that can be checked cheaply.

    Returns the checkpoint's config and the letterboxed reference (1, 3, h, w). Raises ValueError on the first mistake.
    """
    check_paths(args)
    metadata = read_metadata(args.checkpoint_path)
    config = metadata["config"]
    try:
        with torch.device("meta"):
            vae = VideoVAE(config["vae"])  # no weights yet, only its arithmetic
        limit = min(config["transformer"]["positional_embedding_max_pos"][1:])
    except KeyError as error:
        raise ValueError(f"expected {error} in the config, got none; use an LTX-2.3 checkpoint") from error
    resolve_placement(args, metadata)
    resolve_numbers(args, {**INFERENCE, **config.get("inference", {})}, vae)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("expected a CUDA device, got none on this machine; use --device cpu")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device == "cuda" else "float32"
    canvas = load_canvas(args.ref, args.height, args.width)
    if not args.prompt.strip():
        warn("the prompt is empty, so the video shows whatever the model likes")
    # paper: TASS puts the reference beyond the video, up to twice its size. LTX-2.3: trained up to 2048 pixels.
    if (side := max(args.height, args.width)) * 2 > limit:
        warn(f"a side of {side} px puts reference positions beyond the trained {limit} px; stay within {limit // 2} px")
    return config, canvas


def check_paths(args: argparse.Namespace) -> None:
    out = args.output_path
    if out.suffix != ".mp4":
        raise ValueError(f"expected an output path ending in .mp4, got {out}; rename --output-path")
    if not out.parent.is_dir():
        raise ValueError(f"expected an existing output folder, got {out.parent}; create it")
    for target in (out, out.with_suffix(".png"), out.with_suffix(".json")):
        if target.is_dir() or target.resolve() == args.ref.resolve():
            raise ValueError(f"expected {target} to be free for the output, got a folder or the reference itself; "
                             "change --output-path")
    try:
        with tempfile.TemporaryFile(dir=out.parent):  # permission bits alone miss read-only and full disks
            pass
    except OSError as error:
        raise ValueError(f"expected a writable folder, got {out.parent} ({error}); change --output-path") from error
    for name in ("config.json", "tokenizer.json"):
        if not (args.gemma_root / name).is_file():
            raise ValueError(f"expected {name} in the Gemma folder {args.gemma_root}, got none; check --gemma-root")
    if args.lora:
        path, strength = (args.lora + ["1"])[:2]
        if len(args.lora) > 2 or not is_finite(strength):
            raise ValueError(f"expected --lora PATH [STRENGTH], got {' '.join(args.lora)}; use for example 1.0")
        if not Path(path).is_file():
            raise ValueError(f"expected a LoRA file, got no file at {path}; check --lora")
        args.lora = [path, float(strength)]


def is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def resolve_placement(args: argparse.Namespace, metadata: dict) -> None:
    """The placement the weights were trained with; the LoRA, which is trained last, has the last word."""
    trained = metadata.get("reference_placement")
    if args.lora:
        try:
            with safe_open(args.lora[0], "pt") as file:
                trained = (file.metadata() or {}).get("reference_placement", trained)
        except SafetensorError as error:
            raise ValueError(f"expected a LoRA file, got {args.lora[0]} ({error}); check --lora") from error
    if trained is None:
        warn("neither checkpoint nor LoRA says that it was trained with references; the face may be ignored")
    elif args.placement not in (None, trained):
        raise ValueError(f"expected --placement {trained} (as trained), got {args.placement}; leave --placement out")
    args.placement = args.placement or trained or "tass"
    reference_grid(1, 1, 1, args.placement)  # complains about a name it does not know


def resolve_numbers(args: argparse.Namespace, defaults: dict, vae: VideoVAE) -> None:
    for name in ("height", "width", "num_frames", "frame_rate", "text_scale", "ref_scale", "rescale"):
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
    if args.num_inference_steps is None:
        args.num_inference_steps = defaults["steps"]
    args.schedule_tokens = defaults["schedule_tokens"]
    for name, step, offset in (("height", vae.space_scale, 0), ("width", vae.space_scale, 0),
                               ("num_frames", vae.time_scale, 1)):
        value = getattr(args, name)
        lower = max((value - offset) // step, 1 - offset) * step + offset  # the largest legal size that is not above
        if value != lower:
            rule = f"a multiple of {step}" if offset == 0 else f"{step}*k + {offset}"
            near = f"{lower}" if value < lower else f"{lower} or {lower + step}"
            raise ValueError(f"expected --{name.replace('_', '-')} to be {rule}, got {value}; use {near}")
    for name, low, high in (("num_inference_steps", 1, 10_000), ("frame_rate", 1, 240), ("text_scale", 0, 1000),
                            ("ref_scale", 0, 1000), ("rescale", 0, 1), ("seed", 0, 2**63 - 1)):
        if not low <= (value := getattr(args, name)) <= high:  # NaN fails too
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"expected {flag} between {low} and {high}, got {value}; leave it out for the default")


def load_canvas(path: Path, height: int, width: int) -> Tensor:
    """The reference on a canvas of the video's size, (1, 3, h, w) in [-1, 1]."""
    if not path.is_file():
        got = "a folder" if path.is_dir() else "no such file"
        raise ValueError(f"expected a picture at {path}, got {got}; check --ref")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken camera notes, and large photos below PIL's hard limit
            with Image.open(path) as image:
                return letterbox(image, height, width)[None]
    except Exception as error:  # decoders raise nearly every type there is on damaged files
        raise ValueError(f"expected a readable picture, got {path} ({error}); save it as PNG or JPEG") from error


def settings(args: argparse.Namespace) -> dict:
    """The resolved arguments and the weight of every stream that is run, as JSON can hold them."""
    weights = stream_weights(args.text_scale, args.ref_scale, args.order)
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    return values | {"streams": {STREAM_NAMES[stream]: weight for stream, weight in weights.items()}}


def warn(text: str) -> None:
    print(f"warning: {text}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    start = time.perf_counter()
    args = build_parser().parse_args(arguments)
    torch.set_flush_denormal(True)  # denormal numbers can slow a CPU convolution tenfold
    reasons = {"device": "asked for" if args.device != "auto" else "found", "seed": "noise drawn on the CPU",
               "dtype": "asked for" if args.dtype != "auto" else "the device's default"}
    try:
        config, canvas = resolve(args)
        for name, reason in reasons.items():
            print(f"{name:8s}{getattr(args, name)} ({reason})")
        if args.dry_run:
            print(*(f"  {name} = {value!r}" for name, value in settings(args).items()), sep="\n")
            return 0
        run(args, config, canvas)
    except (ValueError, OSError, SafetensorError, RuntimeError, MemoryError) as error:
        message = " ".join(str(error).split())  # one line, whatever a library had to say
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in message):
            message = "expected enough memory for this size, got too little; lower --width, --height or --num-frames"
        elif isinstance(error, RuntimeError):
            raise  # a mistake of ours, which needs its traceback
        message += "" if "; " in message else "; check that file and the free space"
        print(f"sample.py: error: {message}", file=sys.stderr)
        return 2
    print(f"output  {args.output_path} (.png and .json beside it)\nseconds {time.perf_counter() - start:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
