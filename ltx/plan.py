"""What fits on which card: parameters, bytes, tokens and operations of a run, each with its arithmetic.

The idea. Whether a 22-billion-parameter model runs on the card at hand can be known before 46 GB are downloaded. Tables
typed in by hand go stale with the next change of code; here the modules themselves are built on the meta device, which
holds shapes and no numbers, and counted. A formula is printed from the very text it is computed from.

LTX-2.3: the header of the 22B checkpoint (REAL, GEMMA) and the official size of a video.
paper: ST-DRC, arXiv 2606.02441: three streams per step, of which one reads the reference tokens as well.
our reading: RESERVE, an allowance. Nothing in this file was measured on a CUDA device.

Conventions. GB is 10^9 bytes, and a card of 12 GB counts as 12 * 10^9; the up to 7 % more that it holds are left to
  driver and screen. FLOPs: a multiply-add is 2; matrix products and convolutions only. Batch 1; prompt and negative
  prompt go through the text encoder together (P = 2). Attention is the fused kind, which keeps no scores. Off: ref_scale 0.
Letters. K blocks, D width, h heads, N text tokens, L video and R reference tokens, n tokens of a pass (L or L + R), U
  distinct noise levels in it (reference tokens add one), C latent channels, b bytes of a number, Kc connector blocks.
  Gemma: Kg layers, Dg width, Ig of the MLP, Qg of the queries. Numbers in the matrices of Gemma's layers (Wg), of the
  projection (We), of the connector (Wc).

    python plan.py                                          # LTX-2.3 at 768 x 512, 121 frames
    python plan.py CHECKPOINT GEMMA_FOLDER                  # a given file; sample.py --plan takes other sizes too

Read next: video.py
"""

import ast
import math
import operator
import os
import sys
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from guidance import stream_weights
from ltx import text
from ltx.checkpoint import TYPES, open_file, read_metadata, shapes_from
from ltx.gemma import GemmaConfig, GemmaTextModel
from ltx.offload import FLOAT8, cast_linears
from ltx.vae import Tiling, VideoVAE
from model import TransformerConfig, VideoTransformer

GB = 10**9
RESERVE = 1 * GB  # our reading: for the CUDA context, libraries and fragmentation
CARDS = (12, 16, 24, 48, 80)
LARGEST = 10**10  # pixels; 120 frames of 8192 x 8192, whose thousands of tiles are still walked in seconds
# sample.py's flags -> where the text model's layers wait, where the transformer's do
OPTIONS = {"no flag": ("none", "none"), "--offload-text cpu": ("cpu", "none"), "--offload cpu": ("cpu", "cpu"),
           "--offload disk": ("disk", "disk")}  # fmt: skip
# LTX-2.3: the sizes in the header of the 22B checkpoint; those of the transformer are TransformerConfig's defaults.
REAL = {
    "transformer": {**TransformerConfig().to_checkpoint(), "connector_num_layers": 8, "connector_attention_head_dim": 128,
                    "connector_num_attention_heads": 32, "connector_num_learnable_registers": 128},
    "vae": {"in_channels": 3, "out_channels": 3, "latent_channels": 128, "patch_size": 4, "decoder_base_channels": 128,
            "encoder_blocks": [["res_x", 4], ["compress_space", 2], ["res_x", 6], ["compress_time", 2], ["res_x", 4],
                               ["compress_all", 2], ["res_x", 2], ["compress_all", 1], ["res_x", 2]],
            "decoder_blocks": [["res_x", 4], ["compress_space", 2], ["res_x", 6], ["compress_time", 2], ["res_x", 4],
                               ["compress_all", 1], ["res_x", 2], ["compress_all", 2], ["res_x", 2]]},
}  # fmt: skip
GEMMA = GemmaConfig(hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16,
                         num_key_value_heads=8, sliding_window=1024, global_factor=8.0)  # fmt: skip

OPERATORS = {ast.Add: operator.add, ast.Mult: operator.mul}
# Evaluated as they stand. Operations of one pass of the transformer, and of the text encoder for one prompt.
PASS = {
    "self-attention, linears": "K * 2*n * (4*D*D + D*h)", "self-attention, scores": "K * 4*n*n*D",
    "text attention, linears": "K * 2 * (n*(2*D*D + D*h) + N*2*D*D)", "text attention, scores": "K * 4*n*N*D",
    "feed-forward": "K * 2*n * 8*D*D", "adaLN": "2*U*(256*D + 10*D*D) + 2*(256*D + 3*D*D)", "in, out": "2*n*D * 2*C",
}  # fmt: skip
PROMPT = {"Gemma, linears": "2*N*Wg", "Gemma, scores": "Kg * 4*N*N*Qg", "projection": "2*N*We",
          "connector, linears": "2*N*Wc", "connector, scores": "Kc * 4*N*N*D"}  # fmt: skip
# Largest sum of bytes alive at once besides the weights, by stage; tests hold the sums to measurements.
ALIVE = {
    # All of Gemma's states with one layer's MLP and norms; then in the projection: states, normalised, zeros, masked.
    "Gemma": "P*N*b * ((Kg + 1)*Dg + 4*Ig + 6*Dg)", "projection": "P*N*b * 4*(Kg + 1)*Dg",
    "connector": "P*N*b * 12*D",  # as below
    # Feed-forward: the block's input, x, modulated x, gate, 4 D before and 4 D after the GELU; cos and sin.
    "denoise": "13*n*D*b + 2*N*D*b",
}


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all tensors made while it is on, also on the meta device; `peak` is the largest sum.

    workspace: input and output of the largest convolution, which a library may copy into another layout.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.workspace = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made, given = ({t.untyped_storage()._cdata: t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor)}
                       for tree in (out, (args, kwargs)))  # fmt: skip
        for storage in (made[key] for key in made.keys() - given.keys()):  # no views, no changes in place
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        if function is torch.ops.aten.convolution.default:
            self.workspace = max(self.workspace, args[0].nbytes + out.nbytes)
        return out

    def _free(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class Plan:
    """What `plan` finds. Everything but `parts`, `sizes` and `passes` is in FLOPs or bytes."""

    parts: dict[str, dict[str, Tensor]]  # tensors on the meta device, under their names in the checkpoint
    sizes: dict[str, int]  # the letters of the header
    passes: dict[int, int]  # tokens of a pass -> such passes per guided step
    flops: dict[str, int]
    alive: dict[str, int]  # by stage
    weights: dict[str, int]  # by part
    needs: dict[str, dict[str, int]]  # by option and stage: weights on the card, what is alive, RESERVE
    pinned: dict[str, int]  # by option: page-locked memory of the computer


def compute(formulas: dict[str, str], sizes: dict[str, int]) -> dict[str, int]:
    """Evaluate this file's own formulas above, so that what is printed is what is computed: sums, products, letters."""
    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        return sizes[node.id] if isinstance(node, ast.Name) else node.value

    return {name: value(ast.parse(formula, mode="eval").body) for name, formula in formulas.items()}


def numbers(part: dict[str, Tensor], smallest_rank: int = 0) -> int:
    return sum(tensor.numel() for tensor in part.values() if tensor.ndim >= smallest_rank)


def part_bytes(part: dict[str, Tensor], b: int) -> int:
    return sum(tensor.numel() * (1 if tensor.dtype == FLOAT8 else b) for tensor in part.values())


def build_parts(config: dict, gemma: GemmaConfig) -> tuple[dict[str, dict[str, Tensor]], VideoVAE]:
    """Every part on the meta device, in the order of use; and the VAE."""
    settings, prefix = config["transformer"], "model.diffusion_model."
    with torch.device("meta"):
        language, connector, vae = GemmaTextModel(gemma), text.Connector(settings), VideoVAE(config["vae"])
        projection = text.FeatureExtractor(settings, gemma.hidden_size, gemma.num_hidden_layers + 1)
        plain, cast = (VideoTransformer(TransformerConfig.from_checkpoint(settings)) for _ in range(2))
    cast_linears(cast.transformer_blocks)

    def split(prefix: str, module: nn.Module, start: str = "") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        state = module.state_dict()
        return tuple({prefix + k: t for k, t in state.items() if k.startswith(start) == inside} for inside in (True, False))

    parts = {}
    parts["Gemma layers"], parts["Gemma embedding"] = split("", language, "layers.")
    parts["projection"], _ = split(text.EXTRACTOR_PREFIX, projection)
    parts["connector"], _ = split(text.CONNECTOR_PREFIX, connector)
    parts["VAE encoder"], parts["VAE decoder"] = split("vae.", vae, "encoder.")
    parts["blocks"], parts["transformer, rest"] = split(prefix, plain, "transformer_blocks.")
    parts["blocks in fp8-cast"], _ = split(prefix, cast, "transformer_blocks.")
    return parts, vae


def walk_vae(vae: VideoVAE, grid: tuple[int, int, int], dtype: torch.dtype) -> tuple[dict[str, int], dict[str, int]]:
    """Runs the VAE on shapes alone: FLOPs of its convolutions, bytes alive at most with a convolution's workspace."""
    vae, s = vae.to(dtype), vae.space_scale
    picture = torch.empty(1, 3, 1, grid[1] * s, grid[2] * s, dtype=dtype, device="meta")
    latent = torch.empty(1, vae.latent_channels, *grid, dtype=dtype, device="meta")
    flops, alive = {}, {}
    for name, work in {"encode": lambda: vae.decode(vae.encode(picture)), "decode": lambda: vae.decode(latent),
                       "decode, tiled": lambda: [None for _ in vae.decode_tiles(latent, Tiling())]}.items():  # fmt: skip
        with torch.no_grad(), FlopCounterMode(display=False) as counter, LiveBytes() as live:
            work()
        flops[name], alive[name] = counter.get_total_flops(), live.peak + live.workspace
    return flops, alive


def least_bytes(config: dict, vae: VideoVAE, grid: tuple[int, int, int], dtype: torch.dtype, tiled: bool = True
                ) -> dict[str, int]:
    """What a video of this size takes at the very least besides the weights, by what is done: to refuse it in time.

    vae: for its scales; grid: latent frames, rows, columns. Counted are three of the VAE's widest tensors: input,
    normalised and output of its last block. Tiled, it sees less at once of the video than of the reference.
    """
    (F, H, W), c, sizes = grid, TransformerConfig.from_checkpoint(config["transformer"]), config["vae"]
    once = 3 * sizes["decoder_base_channels"] * H * W * (vae.space_scale // sizes["patch_size"]) ** 2 * dtype.itemsize
    video = once if tiled else once * ((F - 1) * vae.time_scale + 1)
    letters = {"n": (F + 1) * H * W, "N": 0, "D": c.dim, "b": dtype.itemsize}
    return {"encode the reference": once, "decode the video": video,
            "denoise": compute({"": ALIVE["denoise"]}, letters)[""]}


def on_card(offload_text: str, offload: str, fp8: bool) -> dict[str, list[str]]:
    """The weights on the card in every stage; "2 x" a streamed part stands for two of its blocks or layers."""
    language, vae = ["Gemma layers", "Gemma embedding"], ["VAE encoder", "VAE decoder"]
    blocks = ["blocks in fp8-cast", "transformer, rest", "one weight, cast"] if fp8 else ["blocks", "transformer, rest"]
    for part, where in ((language, offload_text), (blocks, offload)):
        if where != "none":
            part[0] = f"2 x {part[0]}"
    return {"Gemma": language, "projection": ["projection"], "connector": ["connector"], "encode": vae, "denoise": blocks,
            "decode": vae, "decode, tiled": vae}  # fmt: skip


def plan(config: dict = REAL, gemma: GemmaConfig = GEMMA, height: int = 512, width: int = 768,
         num_frames: int = 121, text_scale: float = 3.0, ref_scale: float = 2.0, order: str = "text_first",
         dtype: torch.dtype = torch.bfloat16) -> Plan:
    """All figures of one run; height, width in pixels, scales and order as in guidance.py.

    Raises ValueError on sizes the VAE cannot make, a config that is not LTX-2.3's, or a scale that is not finite.
    """
    (parts, vae), settings = build_parts(config, gemma), config["transformer"]
    if min(height, width, num_frames) < 1 or height % vae.space_scale or width % vae.space_scale \
            or (num_frames - 1) % vae.time_scale:
        raise ValueError(f"expected sides in steps of {vae.space_scale} and {vae.time_scale}*k + 1 frames, got "
                         f"{width} x {height}, {num_frames} frames; change the size")
    if width * height * num_frames > LARGEST:
        raise ValueError(f"expected at most {LARGEST:.0e} pixels in a video, got {short(width * height * num_frames)}; "
                         "lower --height, --width or --num-frames")
    grid = ((num_frames - 1) // vae.time_scale + 1, height // vae.space_scale, width // vae.space_scale)
    L, R, c, b = math.prod(grid), grid[1] * grid[2], TransformerConfig.from_checkpoint(settings), dtype.itemsize
    matrices = {name: t for name, t in parts["connector"].items() if not name.endswith("registers")}
    sizes = {"K": c.num_layers, "D": c.dim, "h": c.heads, "C": c.in_channels, "b": b, "P": 2, "L": L, "R": R,
             "N": settings.get("text_max_length", text.DEFAULT_TEXT_LENGTH), "Kc": settings["connector_num_layers"],
             "Kg": gemma.num_hidden_layers, "Dg": gemma.hidden_size, "Ig": gemma.intermediate_size,
             "Qg": gemma.num_attention_heads * gemma.head_dim, "Wg": numbers(parts["Gemma layers"], 2),
             "We": numbers(parts["projection"], 2), "Wc": numbers(matrices, 2)}  # fmt: skip
    streams = [ref for _, ref in stream_weights(text_scale, ref_scale, order)]
    passes = {n: streams.count(n > L) for n in (L, L + R) if (n > L) in streams}
    flops, alive = walk_vae(vae, grid, dtype)
    flops |= {n: sum(compute(PASS, sizes | {"n": n, "U": 1 + (n > L)}).values()) for n in (L, L + R)}
    flops |= {"step": sum(flops[n] * k for n, k in passes.items()), "text": 2 * sum(compute(PROMPT, sizes).values())}
    alive |= compute(ALIVE, sizes | {"n": max(passes)})
    weights = {name: part_bytes(part, b) for name, part in parts.items()} | {"one weight, cast": 4 * c.dim**2 * b}
    for name, count in {"Gemma layers": "Kg", "blocks": "K", "blocks in fp8-cast": "K"}.items():
        weights[f"2 x {name}"] = 2 * weights[name] // sizes[count]
    needs, pinned = {}, {}
    for fp8 in (False, True):
        for option, offloads in OPTIONS.items():
            option = " ".join([option] * (option != "no flag" or not fp8) + ["--quantization fp8-cast"] * fp8)
            needs[option] = {stage: sum(weights[name] for name in names) + alive[stage] + RESERVE
                             for stage, names in on_card(*offloads, fp8).items()}
            # PyTorch rounds page-locked tensors up to a power of two. Gemma's layers are gone before the blocks come.
            waiting = zip(offloads, ("Gemma layers", "blocks in fp8-cast" if fp8 else "blocks"), strict=True)
            pinned[option] = max(sum(1 << (part_bytes({"": t}, b) - 1).bit_length() for t in parts[name].values())
                                 if offload == "cpu" else 0 for offload, name in waiting)
    return Plan(parts, sizes, passes, flops, alive, weights, needs, pinned)


def stored_bytes(path: str | os.PathLike, part: dict[str, Tensor]) -> int:
    """Bytes of a part in a file, from the file's table. Raises ValueError when a tensor is absent or has another shape."""
    with open_file(path) as file:
        stored = {name: file.get_slice(name) for name in file.keys() if name in part}
    for name, tensor in part.items():
        if name not in stored or tuple(stored[name].get_shape()) != tuple(tensor.shape):
            raise ValueError(f"expected {name} of shape {tuple(tensor.shape)} in {path}, got none; "
                             "give the checkpoint's own --gemma-root, or download it again")
    return sum(tensor.numel() * TYPES[stored[name].get_dtype()].itemsize for name, tensor in part.items())


def short(value: float, unit: str = "") -> str:
    """12345678 -> "12.35 M"."""
    prefix, size = next(((p, s) for p, s in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if value >= s), ("", 1))
    return f"{value / size:.2f} {prefix}{unit}" if value else "0"


def table(head: list, rows: list[list]) -> None:
    print(*("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)), "", sep="\n")


def fits(p: Plan) -> list[list[str]]:
    """One row per option: the bytes of every stage, and whether all stages fit, for every card."""
    rows = []
    for option, need in p.needs.items():
        untiled, tiled = (max(n for stage, n in need.items() if stage != out) for out in ("decode, tiled", "decode"))
        cells = ["yes" if untiled <= card * GB else "decode tiled" if tiled <= card * GB else "no" for card in CARDS]
        rows.append([option, *(short(n, "B") for n in need.values()), short(p.pinned[option], "B"), *cells])
    return rows


def print_plan(checkpoint_path: str | os.PathLike | None = None, gemma_root: str | os.PathLike | None = None,
               height: int | None = None, width: int | None = None, num_frames: int | None = None,
               text_scale: float = 3.0, ref_scale: float = 2.0, order: str = "text_first",
               dtype: torch.dtype = torch.bfloat16) -> None:
    """The plan as text and Markdown. No checkpoint: LTX-2.3's; no Gemma folder: the 12B's; no size: the checkpoint's.

    Raises ValueError as `plan`, and when the file is no LTX-2.3 checkpoint.
    """
    config = REAL if checkpoint_path is None else read_metadata(checkpoint_path)["config"]
    gemma = GEMMA if gemma_root is None else GemmaConfig.from_folder(gemma_root)
    size = {"height": 512, "width": 768, "num_frames": 121}
    size |= {key: config.get("inference", {}).get(key, official) for key, official in size.items()}
    size |= {k: v for k, v in (("height", height), ("width", width), ("num_frames", num_frames)) if v is not None}
    with shapes_from(checkpoint_path or "this file"):
        p = plan(config, gemma, **size, text_scale=text_scale, ref_scale=ref_scale, order=order, dtype=dtype)
    z, L = p.sizes, p.sizes["L"]
    print(f"{checkpoint_path or 'LTX-2.3 22B'}: {size}, {dtype}\n{' '.join(f'{k}={v}' for k, v in z.items())}\n")
    rows = [[name, len(part), f"{numbers(part):,}", short(p.weights[name], "B"),
             "-" if checkpoint_path is None or "Gemma" in name else short(stored_bytes(checkpoint_path, part), "B")]
            for name, part in p.parts.items()]  # fmt: skip
    table(["part", "tensors", "parameters", f"bytes in {dtype}", "in the file"], rows)

    print(f"tokens: {L} of the video + {z['R']} of the reference; latent {short(L * z['C'] * 4, 'B')} in float32\n")
    one, both = (compute(PASS, z | {"n": n, "U": 1 + (n > L)}) for n in (L, L + z["R"]))
    table(["one pass", "formula", "FLOPs, n = L", "FLOPs, n = L + R"],
          [[term, f"`{PASS[term]}`", short(one[term]), short(both[term])] for term in PASS])  # fmt: skip
    table(["one prompt", "formula", "FLOPs"], [[k, f"`{PROMPT[k]}`", short(v)] for k, v in compute(PROMPT, z).items()])
    sums = " + ".join(f"{count} x {short(p.flops[n])} ({n} tokens)" for n, count in p.passes.items())
    print(f"guided step {sums} = {short(p.flops['step'])} FLOPs; two prompts {short(p.flops['text'])}; VAE encode "
          f"{short(p.flops['encode'])}, decode {short(p.flops['decode'])}, tiled {short(p.flops['decode, tiled'])}\n")
    walked = "largest sum on a walk through the VAE, and a convolution's workspace"
    table(["alive besides the weights", "formula", "bytes"],
          [[k, f"`{ALIVE[k]}`" if k in ALIVE else walked, short(p.alive[k], "B")] for k in on_card("none", "none", False)])
    lines = [f"{stage}: " + " + ".join(f"{short(p.weights[name], 'B')} {name}" for name in names)
             + f" + {short(p.alive[stage], 'B')} alive + {short(RESERVE, 'B')} reserve = "
             + short(sum(p.weights[name] for name in names) + p.alive[stage] + RESERVE, "B")
             for fp8 in (False, True) for off in OPTIONS.values() for stage, names in on_card(*off, fp8).items()]
    print(*dict.fromkeys(lines), "", sep="\n")
    table(["", *on_card("none", "none", False), "page-locked", *(f"{card} GB" for card in CARDS)], fits(p))
    print("Notice: streamed, the blocks are no longer what is largest on the card; the text encoder and the VAE are.")


if __name__ == "__main__":
    try:
        print_plan(*sys.argv[1:3])
    except ValueError as error:
        print(f"plan.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
