"""What fits on which card: parameters, bytes, tokens and operations of a run, with the arithmetic.

The idea. Whether a model of 22 billion parameters runs on the card at hand can be known before its
46 GB are downloaded. Tables typed by hand go stale; here the modules themselves are built on the
meta device, which holds shapes and no numbers, and counted. A formula is printed from the very text
it is computed from.

LTX-2.3: the header of the 22B checkpoint (REAL, GEMMA) and the official size of a video.
paper: ST-DRC (arXiv 2606.02441): three streams a step, one of which reads the reference tokens too.
our reading: RESERVE, an allowance. Nothing in this file was measured on a CUDA device.

Conventions. GB is 10^9 bytes, and a card of 12 GB counts as 12 * 10^9; the up to 7 % more that it
  holds are left to driver and screen. FLOPs: a multiply-add is 2; matrix products and convolutions
  only. Batch 1; prompt and negative prompt are encoded together (P = 2). Attention keeps no scores.
Letters. K blocks, D width, h heads, N text tokens, L video and R reference tokens, n tokens of a
  pass (L or L + R), U distinct noise levels in it (reference tokens add one), C latent channels, b
  bytes of a number, Kc connector blocks. Gemma: Kg layers, Dg width, Ig of the MLP, Qg of the
  queries. Numbers in the matrices of Gemma's layers (Wg), the projection (We), the connector (Wc).

    python -m ltx.plan [CHECKPOINT GEMMA_FOLDER]   # without: LTX-2.3; sample.py --plan has sizes

Read next: ltx/load.py
"""

import argparse
import ast
import math
import operator
import os
import sys
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common.cli import command
from guidance import Guidance, stream_weights
from ltx import text
from ltx.checkpoint import TYPES, open_file, read_metadata, shapes_from
from ltx.gemma import GemmaConfig, GemmaTextModel
from ltx.offload import FLOAT8, cast_linears
from ltx.tiling import Tiling
from ltx.vae import VAE_PREFIX, VideoVAE
from model import TRANSFORMER_PREFIX, TransformerConfig, VideoTransformer

GB = 10**9
RESERVE = 1 * GB  # our reading: for the CUDA context, libraries and fragmentation
REACHED = 0.6  # our reading: of the rate of a plain matrix product, by a whole pass
CARDS = (12, 16, 24, 48, 80)
LARGEST = 10**10  # pixels; 120 frames of 8192 x 8192, whose many tiles are walked in seconds
SIZE = {"height": 512, "width": 768, "num_frames": 121}  # LTX-2.3: the official one
STEPS = 30
GUIDANCE = Guidance()
BUNDLED = Path(__file__).resolve().parents[1] / "weights" / "tiny" / "model.safetensors"
# sample.py's flags -> where the text model's layers wait, where the transformer's do
OPTIONS = {"no flag": ("none", "none"), "--offload-text cpu": ("cpu", "none"),
           "--offload cpu": ("cpu", "cpu"), "--offload disk": ("disk", "disk")}  # fmt: skip
# LTX-2.3: the header of the 22B checkpoint; the transformer's are TransformerConfig's defaults.
REAL = {
    "transformer": {**TransformerConfig().to_checkpoint(), "connector_num_layers": 8,
                    "connector_attention_head_dim": 128, "connector_num_attention_heads": 32,
                    "connector_num_learnable_registers": 128},
    "vae": {"in_channels": 3, "out_channels": 3, "latent_channels": 128, "patch_size": 4,
            "decoder_base_channels": 128,
            "encoder_blocks": [["res_x", 4], ["compress_space", 2], ["res_x", 6],
                               ["compress_time", 2], ["res_x", 4], ["compress_all", 2],
                               ["res_x", 2], ["compress_all", 1], ["res_x", 2]],
            "decoder_blocks": [["res_x", 4], ["compress_space", 2], ["res_x", 6],
                               ["compress_time", 2], ["res_x", 4], ["compress_all", 1],
                               ["res_x", 2], ["compress_all", 2], ["res_x", 2]]},
}  # fmt: skip
GEMMA = GemmaConfig(hidden_size=3840, intermediate_size=15360, num_hidden_layers=48,
                    num_attention_heads=16, num_key_value_heads=8, sliding_window=1024,
                    global_factor=8.0)  # fmt: skip

# Evaluated as they stand: operations of one pass of the transformer, and of encoding one prompt.
PASS = {"self-attention, linears": "K * 2*n * (4*D*D + D*h)",
        "self-attention, scores": "K * 4*n*n*D",
        "text attention, linears": "K * 2 * (n*(2*D*D + D*h) + N*2*D*D)",
        "text attention, scores": "K * 4*n*N*D",
        "feed-forward": "K * 2*n * 8*D*D",
        "adaLN": "2*U*(256*D + 10*D*D) + 2*(256*D + 3*D*D)",
        "in, out": "2*n*D * 2*C"}  # fmt: skip
PROMPT = {"Gemma, linears": "2*N*Wg", "Gemma, scores": "Kg * 4*N*N*Qg", "projection": "2*N*We",
          "connector, linears": "2*N*Wc", "connector, scores": "Kc * 4*N*N*D"}  # fmt: skip
# Most bytes alive at once besides the weights, by stage; tests hold the sums to measurements.
ALIVE = {
    # All of Gemma's states, one layer's MLP and norms; then states, normalised, zeros, masked.
    "Gemma": "P*N*b * ((Kg + 1)*Dg + 4*Ig + 6*Dg)",
    "projection": "P*N*b * 4*(Kg + 1)*Dg",
    "connector": "P*N*b * 12*D",
    # Feed-forward: the block's input, x, modulated x, 4 D either side of GELU; cos and sin.
    "denoise": "12*n*D*b + 2*N*D*b",
}


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all tensors made while it is on, also on the meta device.

    workspace: input and output of the largest convolution, which a library may copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.workspace = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made, given = ({t.untyped_storage()._cdata: t.untyped_storage()
                        for t in tree_leaves(tree) if isinstance(t, Tensor)}
                       for tree in (out, (args, kwargs)))
        for key in made.keys() - given.keys():  # no views, no changes in place
            self.now += made[key].nbytes()
            weakref.finalize(made[key], self._free, made[key].nbytes())
        self.peak = max(self.peak, self.now)
        if function is torch.ops.aten.convolution.default:
            self.workspace = max(self.workspace, args[0].nbytes + out.nbytes)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Plan:
    """What `plan` finds, in FLOPs or bytes where nothing else is said."""

    parts: dict[str, dict[str, Tensor]]        # tensors on the meta device, by their names in files
    sizes: dict[str, int]                      # the letters of the header
    passes: dict[int, int]                     # tokens of a pass -> such passes per guided step
    flops: dict[str | int, int]                # by stage, or by the tokens of a pass
    alive: dict[str, int]                      # by stage
    needs: dict[str, dict[str, dict[str, int]]]  # by option, stage, and what takes them
    pinned: dict[str, int]                     # by option: page-locked memory of the computer


OPERATORS = {ast.Add: operator.add, ast.Mult: operator.mul}


def compute(formulas: dict[str, str], sizes: dict[str, int]) -> dict[str, int]:
    """Evaluate this file's own formulas, so that what is printed is what is computed: sums,
    products, letters. Not with eval: nothing in the product runs text."""
    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        return sizes[node.id] if isinstance(node, ast.Name) else node.value

    return {name: value(ast.parse(formula, mode="eval").body)
            for name, formula in formulas.items()}


def numbers(part: dict[str, Tensor], smallest_rank: int = 0) -> int:
    return sum(tensor.numel() for tensor in part.values() if tensor.ndim >= smallest_rank)


def part_bytes(part: dict[str, Tensor], b: int) -> int:
    return sum(tensor.numel() * (1 if tensor.dtype == FLOAT8 else b) for tensor in part.values())


def locked_bytes(part: dict[str, Tensor], b: int) -> int:
    """In page-locked memory, where PyTorch rounds each tensor up to a power of two."""
    return sum(1 << (part_bytes({"": tensor}, b) - 1).bit_length() for tensor in part.values())


def build_parts(config: dict, gemma: GemmaConfig) -> tuple[dict[str, dict[str, Tensor]], VideoVAE]:
    """Every part on the meta device, in the order of use; and the VAE."""
    settings = config["transformer"]
    with torch.device("meta"):
        language, vae = GemmaTextModel(gemma), VideoVAE(config["vae"])
        states = gemma.num_hidden_layers + 1
        projection = text.FeatureExtractor(settings, gemma.hidden_size, states)
        connector = text.Connector(settings)
        model = VideoTransformer(TransformerConfig.from_checkpoint(settings))

    def split(prefix: str, module: nn.Module, start: str = "") -> list[dict[str, Tensor]]:
        """Tensors whose name begins with start, and the others."""
        state = module.state_dict()
        return [{prefix + name: tensor for name, tensor in state.items()
                 if name.startswith(start) == inside} for inside in (True, False)]

    parts = {}
    parts["Gemma layers"], parts["Gemma embedding"] = split("", language, "layers.")
    parts["projection"], _ = split(text.EXTRACTOR_PREFIX, projection)
    parts["connector"], _ = split(text.CONNECTOR_PREFIX, connector)
    parts["VAE encoder"], parts["VAE decoder"] = split(VAE_PREFIX, vae, "encoder.")
    blocks = "transformer_blocks."
    parts["blocks"], parts["transformer, rest"] = split(TRANSFORMER_PREFIX, model, blocks)
    cast_linears(model.transformer_blocks)
    parts["blocks in fp8-cast"], _ = split(TRANSFORMER_PREFIX, model, blocks)
    return parts, vae


def walk_vae(vae: VideoVAE, grid: tuple[int, int, int], dtype: torch.dtype
             ) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs of the VAE's stages, and bytes alive with a convolution's workspace, from shapes."""
    vae, s = vae.to(dtype), vae.space_scale
    picture = torch.empty(1, 3, 1, grid[1] * s, grid[2] * s, dtype=dtype, device="meta")
    latent = torch.empty(1, vae.latent_channels, *grid, dtype=dtype, device="meta")
    work = {"encode": lambda: vae.decode(vae.encode(picture)),
            "decode": lambda: vae.decode(latent),
            "decode, tiled": lambda: [None for _ in vae.decode_tiles(latent, Tiling())]}
    flops, alive = {}, {}
    for name, run in work.items():
        with torch.no_grad(), FlopCounterMode(display=False) as counter, LiveBytes() as live:
            run()
        flops[name], alive[name] = counter.get_total_flops(), live.peak + live.workspace
    return flops, alive


def least_bytes(config: dict, vae: VideoVAE, grid: tuple[int, int, int], dtype: torch.dtype,
                tiled: bool = True) -> dict[str, int]:
    """What a video of this size takes at the very least besides the weights: to refuse it in time.

    vae: for its scales; grid: latent frames, rows, columns. Counted are three of the VAE's widest
    tensors, those of its last block. Tiled, it sees no more of the video than of the reference.
    """
    (F, H, W), sizes, b = grid, config["vae"], dtype.itemsize
    pixels = H * W * (vae.space_scale // sizes["patch_size"]) ** 2
    frame = 3 * sizes["decoder_base_channels"] * pixels * b
    width = TransformerConfig.from_checkpoint(config["transformer"]).dim
    denoise = compute({"": ALIVE["denoise"]}, {"n": (F + 1) * H * W, "N": 0, "D": width, "b": b})
    return {"encode the reference": frame, "denoise": denoise[""],
            "decode the video": frame if tiled else frame * ((F - 1) * vae.time_scale + 1)}


def on_card(offload_text: str, offload: str, fp8: bool) -> dict[str, list[str]]:
    """The weights on the card by stage; "2 x" a streamed part stands for two of its blocks."""
    language, vae = ["Gemma layers", "Gemma embedding"], ["VAE encoder", "VAE decoder"]
    blocks = ["blocks", "transformer, rest"]
    if fp8:
        blocks = ["blocks in fp8-cast", "transformer, rest", "one weight, cast"]
    for part, where in ((language, offload_text), (blocks, offload)):
        if where != "none":
            part[0] = f"2 x {part[0]}"
    return {"Gemma": language, "projection": ["projection"], "connector": ["connector"],
            "encode": vae, "denoise": blocks, "decode": vae, "decode, tiled": vae}


def latent_grid(vae: VideoVAE, height: int, width: int, num_frames: int) -> tuple[int, int, int]:
    """Latent frames, rows, columns. Raises ValueError on sizes it cannot make, and huge ones."""
    t, s = vae.time_scale, vae.space_scale
    if min(height, width, num_frames) < 1 or height % s or width % s or (num_frames - 1) % t:
        raise ValueError(f"expected sides in steps of {s} and {t}*k + 1 frames, got "
                         f"{width} x {height}, {num_frames} frames; change the size")
    if (pixels := width * height * num_frames) > LARGEST:
        raise ValueError(f"expected at most {LARGEST:.0e} pixels in a video, got {short(pixels)}; "
                         "lower --height, --width or --num-frames")
    return (num_frames - 1) // t + 1, height // s, width // s


def plan(config: dict = REAL, gemma: GemmaConfig = GEMMA, size: dict[str, int] = SIZE,
         guidance: Guidance = GUIDANCE, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """All figures of one run; size: height, width, num_frames.

    Raises ValueError as `latent_grid`, and on a config that is not LTX-2.3's.
    """
    (parts, vae), settings = build_parts(config, gemma), config["transformer"]
    c, b = TransformerConfig.from_checkpoint(settings), dtype.itemsize
    grid = latent_grid(vae, **size)
    L, R = math.prod(grid), grid[1] * grid[2]
    connector = {k: t for k, t in parts["connector"].items() if not k.endswith("registers")}
    sizes = {"K": c.num_layers, "D": c.dim, "h": c.heads, "C": c.in_channels, "b": b, "P": 2,
             "L": L, "R": R, "N": settings.get("text_max_length", text.DEFAULT_TEXT_LENGTH),
             "Kc": settings["connector_num_layers"], "Kg": gemma.num_hidden_layers,
             "Dg": gemma.hidden_size, "Ig": gemma.intermediate_size,
             "Qg": gemma.num_attention_heads * gemma.head_dim,
             "Wg": numbers(parts["Gemma layers"], 2), "We": numbers(parts["projection"], 2),
             "Wc": numbers(connector, 2)}  # fmt: skip
    reads_reference = [ref for _, ref in stream_weights(guidance)]
    passes = {L: reads_reference.count(False), L + R: reads_reference.count(True)}
    passes = {n: count for n, count in passes.items() if count}

    flops, alive = walk_vae(vae, grid, dtype)
    for n in (L, L + R):
        flops[n] = sum(compute(PASS, sizes | {"n": n, "U": 1 + (n > L)}).values())
    flops["step"] = sum(flops[n] * count for n, count in passes.items())
    flops["text"] = sizes["P"] * sum(compute(PROMPT, sizes).values())
    alive |= compute(ALIVE, sizes | {"n": max(passes)})

    weights = {name: part_bytes(part, b) for name, part in parts.items()}
    weights["one weight, cast"] = 4 * c.dim**2 * b
    for name, count in {"Gemma layers": "Kg", "blocks": "K", "blocks in fp8-cast": "K"}.items():
        weights[f"2 x {name}"] = 2 * weights[name] // sizes[count]
    needs, pinned = {}, {}
    for fp8 in (False, True):
        for option, (offload_text, offload) in OPTIONS.items():
            if fp8:
                option = f"{option} --quantization fp8-cast".removeprefix("no flag ")
            needs[option] = {}
            for stage, names in on_card(offload_text, offload, fp8).items():
                terms = {name: weights[name] for name in names}
                needs[option][stage] = terms | {"alive": alive[stage], "reserve": RESERVE}
            blocks = "blocks in fp8-cast" if fp8 else "blocks"
            waiting = {"Gemma layers": offload_text, blocks: offload}
            pinned[option] = max(  # not the sum: Gemma's layers are gone before the blocks come
                locked_bytes(parts[name], b) if where == "cpu" else 0
                for name, where in waiting.items())
    return Plan(parts, sizes, passes, flops, alive, needs, pinned)


def stored_bytes(path: str | os.PathLike, part: dict[str, Tensor]) -> int:
    """Bytes of a part in a file, from the file's table. Raises ValueError when it does not fit."""
    with open_file(path) as file:
        stored = {name: file.get_slice(name) for name in file.keys() if name in part}
    for name, tensor in part.items():
        if name not in stored or tuple(stored[name].get_shape()) != tuple(tensor.shape):
            raise ValueError(f"expected {name} of shape {tuple(tensor.shape)} in {path}, got none; "
                             "give the checkpoint's own --gemma-root, or download it again")
    return sum(t.numel() * TYPES[stored[name].get_dtype()].itemsize for name, t in part.items())


def card_rate(size: int = 8192) -> float:
    """Operations per second of a bf16 matrix product on this machine's card."""
    x = torch.randn(size, size, dtype=torch.bfloat16, device="cuda")
    best = math.inf
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        x @ x
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def duration(flops: int, tflops: float | None) -> str:
    """How long so many operations take, and at what rate: as given, or this machine's card's."""
    if tflops is None and not torch.cuda.is_available():
        return "take as long as the card decides: give its rate with --tflops"
    how = "as given"
    if tflops is None:
        product = card_rate() / 1e12
        tflops, how = round(REACHED * product), f"{REACHED:.0%} of a matrix product's here"
    seconds, units = flops / tflops / 1e12, {"days": 86400, "hours": 3600, "minutes": 60}
    unit, size = next((u for u in units.items() if seconds >= 2 * u[1]), ("seconds", 1))
    return f"take {seconds / size:.1f} {unit} at {tflops:g} TFLOP/s ({how})"


def short(value: float, unit: str = "") -> str:
    """12345678 -> "12.35 M"."""
    prefixes = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
    prefix = next((prefix for prefix, size in prefixes.items() if value >= size), "")
    return f"{value / prefixes.get(prefix, 1):.2f} {prefix}{unit}" if value else "0"


# ------------------------------------------------------------ as text


def table(head: list, rows: list[list]) -> None:
    lines = ("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))
    print(*lines, "", sep="\n")


def fits(p: Plan) -> list[list[str]]:
    """One row per option: the bytes of every stage, and whether all stages fit, for every card."""
    rows = []
    for option, stages in p.needs.items():
        need = {stage: sum(terms.values()) for stage, terms in stages.items()}
        untiled, tiled = (max(n for stage, n in need.items() if stage != out)
                          for out in ("decode, tiled", "decode"))
        cells = ["yes" if untiled <= card * GB else "decode tiled" if tiled <= card * GB else "no"
                 for card in CARDS]
        rows.append([option, *(short(n, "B") for n in (*need.values(), p.pinned[option])), *cells])
    return rows


def print_plan(args: argparse.Namespace) -> None:
    """`show` for sample.py's arguments; its default checkpoint, the bundled one, means LTX-2.3."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    scales = {name: given[name] for name in ("text_scale", "ref_scale", "order") if name in given}
    files = (args.checkpoint_path, args.gemma_root) if args.checkpoint_path != BUNDLED else ()
    show(*files, guidance=Guidance(**scales), tflops=given.get("tflops"),
         **{k: given[k] for k in SIZE if k in given})


def show(checkpoint_path: str | os.PathLike | None = None,
         gemma_root: str | os.PathLike | None = None, guidance: Guidance = GUIDANCE,
         tflops: float | None = None, **size: int) -> None:
    """The plan in bf16, as text and Markdown. Without a file: LTX-2.3 and the 12B Gemma.

    size: height, width, num_frames, or else the checkpoint's own; tflops: of the card. Raises
    ValueError as `plan`, and when the file is no LTX-2.3 checkpoint.
    """
    config = REAL if checkpoint_path is None else read_metadata(checkpoint_path)["config"]
    gemma = GEMMA if gemma_root is None else GemmaConfig.from_folder(gemma_root)
    usual = config.get("inference", {})
    size = {name: size.get(name, usual.get(name, official)) for name, official in SIZE.items()}
    with shapes_from(checkpoint_path or "this file"):
        p = plan(config, gemma, size, guidance)
    print(f"{checkpoint_path or 'LTX-2.3 22B'}: {size}, {torch.bfloat16}")
    print(" ".join(f"{letter}={number}" for letter, number in p.sizes.items()), end="\n\n")
    rows = []
    for name, part in p.parts.items():
        own = checkpoint_path is None or "Gemma" in name
        stored = "-" if own else short(stored_bytes(checkpoint_path, part), "B")
        made = short(part_bytes(part, p.sizes["b"]), "B")
        rows.append([name, len(part), f"{numbers(part):,}", made, stored])
    table(["part", "tensors", "parameters", f"bytes in {torch.bfloat16}", "in the file"], rows)
    print_operations(p)
    steps = usual.get("steps", STEPS)
    everything = steps * p.flops["step"] + p.flops["text"] + p.flops["encode"]
    print(f"{steps} steps, prompts, reference and decoding "
          f"{duration(everything + p.flops['decode, tiled'], tflops)}, loading apart\n")
    print_bytes(p)
    print("Notice: streamed, the blocks are no longer what is largest on the card; "
          "the text encoder and the VAE are.")


def print_operations(p: Plan) -> None:
    z, L = p.sizes, p.sizes["L"]
    print(f"tokens: {L} of the video + {z['R']} of the reference; "
          f"latent {short(L * z['C'] * 4, 'B')} in float32\n")
    one, both = (compute(PASS, z | {"n": n, "U": 1 + (n > L)}) for n in (L, L + z["R"]))
    table(["one pass", "formula", "FLOPs, n = L", "FLOPs, n = L + R"],
          [[term, f"`{PASS[term]}`", short(one[term]), short(both[term])] for term in PASS])
    table(["one prompt", "formula", "FLOPs"],
          [[term, f"`{PROMPT[term]}`", short(n)] for term, n in compute(PROMPT, z).items()])
    f = {name: short(number) for name, number in p.flops.items()}
    sums = " + ".join(f"{count} x {f[n]} ({n} tokens)" for n, count in p.passes.items())
    print(f"guided step {sums} = {f['step']} FLOPs; two prompts {f['text']}; VAE encode "
          f"{f['encode']}, decode {f['decode']}, tiled {f['decode, tiled']}\n")


def print_bytes(p: Plan) -> None:
    stages = list(p.needs["no flag"])
    walked = "largest sum on a walk through the VAE, and a convolution's workspace"
    told = {stage: f"`{ALIVE[stage]}`" if stage in ALIVE else walked for stage in stages}
    table(["alive besides the weights", "formula", "bytes"],
          [[stage, told[stage], short(p.alive[stage], "B")] for stage in stages])
    lines = {}  # by themselves: many are the same for several options
    for stage, terms in (item for need in p.needs.values() for item in need.items()):
        added = " + ".join(f"{short(number, 'B')} {name}" for name, number in terms.items())
        lines[f"{stage}: {added} = {short(sum(terms.values()), 'B')}"] = None
    print(*lines, "", sep="\n")
    table(["", *stages, "page-locked", *(f"{card} GB" for card in CARDS)], fits(p))


if __name__ == "__main__":
    sys.exit(command("plan.py", lambda: show(*sys.argv[1:3])))
