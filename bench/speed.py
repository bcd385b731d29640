"""How fast, and how much memory: our transformer and VAE against diffusers', and a guided step.

Every row runs both programs on the same weights and inputs in one process, turn by turn, so that a
machine that slows down slows both; the times are medians. Diffusers' transformer has an audio half:
its layers are replaced by zeros here (`silence`), so that its time is that of the video half.
"Share" is the floating-point operations of a forward pass (counted by PyTorch) over its time, as a
part of the best rate that a plain matrix product reaches on this machine in this type. "Peak" is
the memory of all tensors alive at the worst moment beyond weights and inputs. A guided step is
held against its arithmetic: the time of one plain forward times the operations of its three.

    python -m bench.speed           about five minutes on two CPU cores; on a CUDA device if any
    python -m bench.speed --quick   one small row of each kind
    python -m bench.speed --full    CUDA only: one guided step of the 48-block transformer at
                                    768x512x121, random bf16 weights, resident, streamed, float8

Targets on a CPU: 0.70 for every transformer row, 0.90 for the VAE rows, 1.05 for the guided step.
A row that misses its target is marked. Exit status 1 if one does.
"""

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends import mkldnn
from torch.utils.flop_counter import FlopCounterMode

from common.cli import Parser
from guidance import Guidance
from ltx import fast_cpu
from ltx.offload import FLOAT8, HostStream, cast_linears
from ltx.plan import REAL, LiveBytes
from ltx.vae import VideoVAE
from model import TransformerConfig, VideoTransformer
from rope import Layout, grid_to_positions, reference_grid, video_grid
from sample import denoise
from tests import test_model, test_vae

# width, heads, latent grid, blocks, repeats
TRANSFORMERS = [(192, 6, (4, 8, 8), 8, 41), (512, 8, (15, 8, 8), 4, 11),
                (1024, 8, (14, 12, 16), 2, 5), (2048, 16, (8, 8, 12), 1, 5)]
# channels, (frames, height, width)
VAES = [(32, (17, 128, 192)), (64, (9, 192, 256)), (64, (1, 512, 768))]
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TEXT = 1024  # rows of the context, as in LTX-2.3
Work = Callable[[], object]


class Silent(nn.Module):
    """In place of an audio layer: zeros of the right shape, at no cost."""

    def forward(self, x: Tensor | None = None, *_: object, hidden_states: Tensor | None = None,
                **__: object) -> Tensor:
        return torch.zeros_like(hidden_states if x is None else x)


def silence(twin: nn.Module) -> nn.Module:
    """Diffusers' transformer without the time of its audio half."""
    for block in twin.transformer_blocks:
        for name in ("audio_attn1", "audio_attn2", "audio_ff"):
            setattr(block, name, Silent())
    return twin


def fast(work: Work) -> Work:
    """The work as sample.py does it on a CPU; diffusers' is timed without."""
    def run() -> object:
        with fast_cpu.FastCPU():
            return work()
    return run


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str, repeats: int, *works: Work) -> list[float]:
    """Median seconds of each, run in turn; one round beforehand is not counted."""
    seconds = [[] for _ in works]
    for turn in range(repeats + 1):
        for i, work in enumerate(works):
            wait(device)
            start = time.perf_counter()
            work()
            wait(device)
            if turn:
                seconds[i].append(time.perf_counter() - start)
    return [statistics.median(s) for s in seconds]


def peak(work: Work) -> float:
    """MB of tensors alive at the worst moment of work()."""
    with LiveBytes() as live:
        work()
    return live.peak / 1e6


def operations(work: Work, dtype: torch.dtype) -> int:
    """Floating-point operations of work()."""
    # The counter does not know the operations of oneDNN that float32 takes.
    with mkldnn.flags(enabled=dtype != torch.float32), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def matrix_rate(dtype: torch.dtype, device: str, size: int) -> float:
    """The best operations per second of a square matrix product: both roads, several tries."""
    x = torch.randn(1, size, size, dtype=dtype, device=device)
    w = torch.randn(size, size, dtype=dtype, device=device)
    roads = [lambda: F.linear(x, w)] + [lambda: fast_cpu.linear(x, w)] * (device == "cpu")
    return 2 * size**3 / min(min(clock(device, 1, *roads)) for _ in range(6))


def rate_of(dtype: torch.dtype, device: str) -> float:
    return matrix_rate(dtype, device, 2048 if device == "cpu" else 8192)


def report(name: str, ours: float, theirs: float, target: float, more: str = "") -> bool:
    ratio = ours / theirs
    verdict = f"{ratio:.2f}" + " MISS" * (ratio > target)
    print(f"| {name} | {1e3 * ours:.0f} | {1e3 * theirs:.0f} | {verdict} |{more}", flush=True)
    return ratio <= target


# ------------------------------------------------------------ transformer


def sizes(width: int, heads: int, layers: int) -> TransformerConfig:
    return TransformerConfig(num_layers=layers, heads=heads, head_dim=width // heads)


def inputs(config: TransformerConfig, grid: tuple[int, int, int], reference: bool,
           dtype: torch.dtype, device: str) -> dict:
    """Arguments of VideoTransformer, with or without the tokens of a reference."""
    cells = [video_grid(*grid)] + [reference_grid(*grid)] * reference
    L, S = len(cells[0]), sum(map(len, cells))
    sigma = torch.tensor([0.7], device=device)
    timesteps = [(sigma, L)] + [(torch.zeros_like(sigma), S - L)] * reference
    latent = torch.randn(1, S, config.in_channels, device=device, dtype=dtype)
    context = torch.randn(1, TEXT, config.dim, device=device, dtype=dtype)
    positions = grid_to_positions(torch.cat(cells), 24)[None].to(device)
    return {"latent": latent, "timesteps": timesteps, "sigma": sigma, "positions": positions,
            "context": context}


def theirs_on(twin: nn.Module, batch: dict, heads: int) -> Tensor:
    """Diffusers' forward, video only: one audio token, no exchange between the two halves."""
    new = batch["latent"].new_zeros
    timesteps = torch.cat([level[:, None].expand(1, n) for level, n in batch["timesteps"]], dim=1)
    return twin(
        hidden_states=batch["latent"], encoder_hidden_states=batch["context"],
        audio_hidden_states=new(1, 1, 4), audio_encoder_hidden_states=new(1, 1, 8 * heads),
        timestep=timesteps * 1000, audio_timestep=batch["sigma"].new_zeros(1, 1),
        sigma=batch["sigma"] * 1000, video_coords=batch["positions"], audio_num_frames=1,
        isolate_modalities=True, use_cross_timestep=True, return_dict=False)[0]


def transformer_rows(device: str, quick: bool) -> bool:
    print("\n| transformer: width, tokens, blocks, type | ours ms | diffusers ms | ratio | share | "
          "peak MB ours, theirs | largest difference |\n|---|---|---|---|---|---|---|")
    good = True
    for name, dtype in TYPES.items():
        rate = rate_of(dtype, device)
        for width, heads, grid, layers, repeats in TRANSFORMERS[: 1 if quick else None]:
            config = sizes(width, heads, layers)
            model = test_model.build(config)
            twin = silence(test_model.diffusers_twin(model)).to(device, dtype)
            model = model.to(device, dtype)
            for reference in (False, True):
                batch = inputs(config, grid, reference, dtype, device)
                ours = fast(lambda: model(**batch))  # noqa: B023
                theirs = lambda: theirs_on(twin, batch, heads)  # noqa: B023, E731
                first, second = clock(device, repeats, ours, theirs)
                share = operations(ours, dtype) / first / rate
                mine, other = ours().float(), theirs().float()
                error = ((mine - other).abs().max() / mine.abs().max()).item()
                more = (f" {share:.0%} of {rate / 1e9:.0f} GFLOP/s | "
                        f"{peak(ours):.0f}, {peak(theirs):.0f} | {error:.0e} |")
                tokens = f"{batch['latent'].shape[1]}{' with reference' * reference}"
                good &= report(f"{width}, {tokens}, {layers}, {name}", first, second, 0.70, more)
    return good


# ------------------------------------------------------------ VAE


def vae_rows(device: str, quick: bool) -> bool:
    print("\n| VAE: channels, frames x height x width, type | ours ms | diffusers ms | ratio | "
          "share | peak MB ours, theirs |\n|---|---|---|---|---|---|")
    good = True
    for name, dtype in TYPES.items():
        rate = rate_of(dtype, device)
        for channels, (frames, h, w) in [(32, (9, 96, 128))] if quick else VAES:
            widths = ("encoder_base_channels", "decoder_base_channels", "latent_channels")
            config = REAL["vae"] | dict.fromkeys(widths, channels)
            torch.manual_seed(0)
            vae = VideoVAE(config).eval()
            twin = test_vae.diffusers_twin(vae, config).to(device, dtype)
            vae = vae.to(device, dtype)
            video = torch.rand(1, 3, frames, h, w, device=device, dtype=dtype) * 2 - 1
            latent = vae.encode(video)
            works = {"encode": (lambda: vae.encode(video),  # noqa: B023
                                lambda: twin.encode(video).latent_dist.mode()),  # noqa: B023
                     "decode": (lambda: vae.decode(latent),  # noqa: B023
                                lambda: twin.decode(latent).sample)}  # noqa: B023
            for work, (plain, theirs) in works.items():
                ours = fast(plain)
                first, second = clock(device, 5, ours, theirs)
                share = operations(ours, dtype) / first / rate
                more = (f" {share:.0%} of {rate / 1e9:.0f} GFLOP/s | "
                        f"{peak(ours):.0f}, {peak(theirs):.0f} |")
                good &= report(f"{work}, {channels}, {frames}x{h}x{w}, {name}", first, second,
                               0.90, more)
    return good


# ------------------------------------------------------------ a guided step


def guided(model: nn.Module, plain: dict, full: dict, grid: tuple[int, int, int]) -> Work:
    """One step from sigma 0.7 to 0 with three streams. plain, full: inputs without, with tokens."""
    noise, L = plain["latent"].float(), plain["latent"].shape[1]
    reference, sigmas = full["latent"][:, L:], torch.tensor([0.7, 0.0])
    context = plain["context"]
    return lambda: denoise(model, noise, sigmas, context, context, reference, Layout(*grid),
                           Guidance())


def guided_rows(device: str, quick: bool) -> bool:
    print("\nA guided step runs the null and the text stream over L tokens and the full one over "
          "L + R.\n\n| guided step: width, L + R, blocks, type | ms | "
          "arithmetic times one plain forward, ms | ratio |\n|---|---|---|---|")
    good = True
    for name, dtype in TYPES.items():
        for width, heads, grid, layers, repeats in TRANSFORMERS[:1] if quick else TRANSFORMERS[1:3]:
            config = sizes(width, heads, layers)
            model = test_model.build(config).to(device, dtype)
            plain, full = (inputs(config, grid, r, dtype, device) for r in (False, True))
            L, S = plain["latent"].shape[1], full["latent"].shape[1]
            one, step = clock(device, repeats, fast(lambda: model(**plain)),  # noqa: B023
                              fast(guided(model, plain, full, grid)))
            few, many = (operations(fast(lambda: model(**batch)), dtype)  # noqa: B023
                         for batch in (plain, full))
            good &= report(f"{width}, {L} + {S - L}, {layers}, {name}", step,
                           one * (2 * few + many) / few, 1.05)
    return good


def random_model(config: TransformerConfig, device: str, streamed: bool,
                 fp8: bool) -> VideoTransformer:
    """Random bf16 weights where a run would have them, without ever holding the model twice."""
    with torch.device("meta"):
        model = VideoTransformer(config)
    if fp8:
        cast_linears(model.transformer_blocks)
    model.to_empty(device=device if not streamed else "cpu")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        value = torch.randn(parameter.shape, device=device, dtype=torch.bfloat16) * 0.02
        dtype = FLOAT8 if parameter.dtype == FLOAT8 else torch.bfloat16
        parameter.data = value.to(dtype).to(parameter.device)  # cast where it is fast
    if streamed:
        blocks, model.transformer_blocks = model.transformer_blocks, nn.ModuleList()
        model.to(device).transformer_blocks = HostStream(blocks, device)
    return model


def copy_rate(device: str, size: int) -> float:
    """Bytes per second from page-locked memory to the card: the most that streaming can reach."""
    if device == "cpu":
        return float("nan")
    there = torch.empty(size, size, device=device)
    here = torch.empty(size, size, pin_memory=True)
    return here.nbytes / clock(device, 3, lambda: there.copy_(here, non_blocking=True))[0]


def full_size(config: TransformerConfig, grid: tuple[int, int, int], device: str,
              size: int = 8192) -> None:
    """A guided step of a transformer with random weights: resident, in float8, streamed, both."""
    rate, cells, flops = matrix_rate(torch.bfloat16, device, size), grid[1] * grid[2], 0
    card = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"torch {torch.__version__}, {card}: {rate / 1e12:.1f} TFLOP/s in a bf16 matrix product "
          f"of {size}, copies at {copy_rate(device, size) / 1e9:.1f} GB/s\n\n"
          f"| {config.num_layers} blocks, {grid[0] * cells} + {cells} tokens | "
          "seconds per guided step | share | peak GB |\n|---|---|---|---|")
    plain, full = (inputs(config, grid, r, torch.bfloat16, device) for r in (False, True))
    for streamed, fp8 in ((False, False), (False, True), (True, False), (True, True)):
        model = random_model(config, device, streamed, fp8)
        step = guided(model, plain, full, grid)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        (seconds,) = clock(device, 2, step)
        used = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else float("nan")
        flops = flops or operations(step, torch.bfloat16)  # the same for all four
        share = flops / seconds / rate
        name = ("--offload cpu" if streamed else "resident") + " fp8-cast" * fp8
        print(f"| {name} | {seconds:.2f} | {share:.0%} | {used:.1f} |", flush=True)
        del model, step
        if device == "cuda":
            torch.cuda.empty_cache()


@torch.no_grad()
def main() -> int:
    parser = Parser("bench.speed", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small row of each kind")
    parser.add_argument("--full", action="store_true", help="the 48 blocks; needs a CUDA device")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.full and device == "cpu":
        parser.error("expected a CUDA device for --full, got none; run it where one is")
    if args.full:
        full_size(TransformerConfig(), (16, 16, 24), device)
        return 0
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
    torch.set_flush_denormal(True)
    threads = f"cpu, {torch.get_num_threads()} threads"
    where = threads if device == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, {where}")
    if device == "cpu":
        x, w = torch.randn(1, 2048, 2048), torch.randn(2048, 2048)
        seconds = clock(device, 5, lambda: F.linear(x, w), lambda: fast_cpu.linear(x, w))
        rates = [2 * 2048**3 / each / 1e9 for each in seconds]
        print("float32 matrix product of 2048: F.linear {:.0f}, "
              "fast_cpu.linear {:.0f} GFLOP/s".format(*rates))
    good = [rows(device, args.quick) for rows in (transformer_rows, vae_rows, guided_rows)]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
