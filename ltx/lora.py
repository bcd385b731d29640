"""LoRA: train and carry a small correction instead of 13 billion weights.

The idea. A linear layer W gets a second path of low rank, W x + B (A x); W stays frozen, and only A
and B are trained, saved and handed on. At rank 32 that is a third of a gigabyte instead of 26.

The failure to prevent: every tool spells the names in the file its own way, and a loader that skips
what it does not know leaves the base model as it was without a word. Here every key is understood,
or belongs to the audio half that this program leaves out, or is an error that names it. Understood:
  diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight     LTX's own tools; what we write
  transformer.transformer_blocks.0.attn1.to_q.lora_A.weight         Diffusers; also without prefix
  lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight        kohya; also with an .alpha
  base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight    PEFT; with adapter_config.json

LTX-2.3: the names in the file; layers, rank and alpha are those of its in-context LoRA recipe.
our reading: that ST-DRC (arXiv 2606.02441) is trained this way. The paper does not say how.

Conventions. A (rank, in), B (out, rank); a file's scale is alpha / rank, or 1 without an alpha.
PEFT keeps alpha in a file of its own, so without that a LoRA of PEFT's is refused.
Strength 0 is off. A LoRA that is used is added into W ("fused"); several add up, in any order.

    add_lora(model, rank=32, alpha=32)                         # train the parameters it returns
    save_lora("st-drc.safetensors", model, {"reference_placement": "tass"})
    metadata = load_lora(other_model, "st-drc.safetensors", strength=1.0)

Read next: ltx/offload.py
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import one_line, parse_json, read_text
from ltx.checkpoint import open_file, write_file
from ltx.offload import from_float8

# LTX-2.3: the modules of the published in-context LoRA recipe.
LORA_TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
                "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
                "ff.net.0.proj", "ff.net.2")
LORA_PREFIX = "diffusion_model."

# ---------------------------------------------------------------- training one, and writing it


class LoRAProduct(torch.autograd.Function):
    """W x + b + B (A x) for rows x (n, in) and a frozen W (out, in), in the type of x.

    The same numbers as by ordinary layers, with less memory and fewer passes over it: the
    correction is added by the matrix product itself, in the gradient too; and a W of one byte a
    number (ltx/offload.py) is cast again in the backward pass instead of kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: tuple[Tensor, Tensor | None, Tensor | None],
                A: Tensor, B: Tensor) -> Tensor:
        weight, scale, bias = frozen
        low = F.linear(x, A)                                  # (n, rank)
        ctx.save_for_backward(x, low, weight, scale, A, B)
        out = F.linear(x, from_float8(weight, scale, x.dtype), bias)
        return out.addmm_(low, B.T)                           # (n, out)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor]:
        x, low, weight, scale, A, B = ctx.saved_tensors
        g_x, g_low = None, g @ B                              # (n, rank)
        if ctx.needs_input_grad[0]:  # the first block's input is data
            g_x = (g @ from_float8(weight, scale, g.dtype)).addmm_(g_low, A)  # (n, in)
        return g_x, None, g_low.T @ x, g.T @ low


class LoRALinear(nn.Module):
    """A frozen linear plus a correction: base(x) + scale * B(A(x)). x (..., in) -> (..., out).

    A (rank, in) and B (out, rank) are float32 whatever the base has, and rounded to the type of x
    when used.
    """

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A = nn.Parameter(A.to(base.weight.device, torch.float32))
        self.lora_B = nn.Parameter(B.to(base.weight.device, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.lora_A.to(x.dtype), (self.lora_B * self.scale).to(x.dtype)
        frozen = self.base.weight, getattr(self.base, "scale", None), self.base.bias
        return LoRAProduct.apply(x.flatten(0, -2), frozen, A, B).unflatten(0, x.shape[:-1])


def add_lora(model: nn.Module, rank: int = 32, alpha: float = 32,
             targets: Iterable[str] = LORA_TARGETS) -> list[nn.Parameter]:
    """Freeze the model, wrap every linear whose name ends in a target; returns what to train.

    our reading: rank, alpha and targets of LTX's in-context LoRA recipe. B starts at zero, so
    nothing changes at first. A wrapped linear's own weight moves to "<name>.base.weight". Raises
    ValueError on a rank below 1, when a target matches nothing, or when there is a LoRA already.
    """
    if rank < 1:
        raise ValueError(f"expected a rank of at least 1, got {rank}; 32 is usual")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("expected a model without LoRA, got one that has it; load a fresh model")
    ends = tuple(f".{target}" for target in targets)
    linears = {n: linear for n, linear in _linears(model).items() if f".{n}".endswith(ends)}
    for end in ends:
        if not any(f".{name}".endswith(end) for name in linears):
            raise ValueError(f"expected linears named like {end[1:]!r}, got none in the model; "
                             "correct the targets")
    model.requires_grad_(False)
    trained = []
    for name, linear in linears.items():
        A = torch.empty(rank, linear.in_features, device=linear.weight.device)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        layer = LoRALinear(linear, A, torch.zeros(linear.out_features, rank), alpha / rank)
        model.set_submodule(name, layer)
        trained += [layer.lora_A, layer.lora_B]
    return trained


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear under its checkpoint name, wrapped or not; LoRALinear names the inner "base"."""
    return {name: module for name, module in model.named_modules()
            if hasattr(module, "in_features") and not name.endswith(".base")}


def lora_state_dict(model: nn.Module, gather: Callable[[Tensor], Tensor] = lambda x: x
                    ) -> dict[str, Tensor]:
    """The LoRA under the names LTX-2.3 tools expect; raises ValueError when the model has none.

    LTX-2.3: loaders add B @ A and know no alpha, so the scale is folded into B.
    gather: puts a tensor together that is spread over several processes (workers.full_tensor).
    """
    state = {}
    for name, layer in _linears(model).items():
        if isinstance(layer, LoRALinear):
            A, B = gather(layer.lora_A.detach()), gather(layer.lora_B.detach())
            state[f"{LORA_PREFIX}{name}.lora_A.weight"] = A                # (rank, in)
            state[f"{LORA_PREFIX}{name}.lora_B.weight"] = B * layer.scale  # (out, rank)
    if not state:
        raise ValueError("expected a model with LoRA, got one without; call add_lora first")
    return state


def save_lora(path: str | os.PathLike, model: nn.Module, metadata: dict[str, str] | None = None,
              dtype: torch.dtype = torch.float32, gather: Callable[[Tensor], Tensor] = lambda x: x,
              write: bool = True) -> None:
    """Write the LoRA alone as a safetensors file. Raises ValueError when the model has none.

    metadata: how it was trained ("reference_placement"). LTX-2.3: the official trainer writes bf16;
    float32 loses nothing. gather, write: with several processes all call this, each gives its part
    to `gather`, and one writes.
    """
    state = lora_state_dict(model, gather)
    if write:
        write_file(path, {key: tensor.to(dtype) for key, tensor in state.items()}, metadata or {})


# ---------------------------------------------------------------- reading one, whoever wrote it

PREFIXES = re.compile(r"(base_model\.model\.)?((model\.)?diffusion_model\.|transformer\.)?")
ENDINGS = {
    ".lora_A.weight": "A", ".lora_A.default.weight": "A",  # LTX, Diffusers, PEFT
    ".lora_B.weight": "B", ".lora_B.default.weight": "B",
    ".lora_down.weight": "A", ".lora.down.weight": "A",    # ComfyUI and kohya, old Diffusers
    ".lora_up.weight": "B", ".lora.up.weight": "B",
    ".alpha": "alpha",
}
# LTX -> Diffusers. In this order, because the second is part of the first.
RENAMED = {"prompt_adaln_single": "prompt_adaln", "adaln_single": "time_embed",
           "patchify_proj": "proj_in"}


PEFT_KEY = re.compile(r"base_model\.model\.|.*\.default\.weight$")
# PEFT's settings: those that are read, and those that change nothing about what a finished adapter
# adds. Any other that is set is refused by name, whichever version of PEFT brings it.
READ = {"alpha_pattern", "lora_alpha", "r", "rank_pattern", "use_rslora"}
HARMLESS = {"auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config",
            "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
            "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "revision",
            "runtime_config", "target_modules", "task_type"}
USUAL = {"bias": ("none",), "peft_type": ("LORA",),
         "init_lora_weights": (True, "gaussian", "eva", "orthogonal")}  # others change the base


class LoRAFile(NamedTuple):
    """pairs: name of a linear -> A (rank, in), B (out, rank), scale. audio_keys: left out."""

    pairs: dict[str, tuple[Tensor, Tensor, float]]
    metadata: dict[str, str]
    audio_keys: int


def read_lora(path: str | os.PathLike, model: nn.Module) -> LoRAFile:
    """Read a LoRA file in any of the spellings above; the model may be on the meta device.

    Keys of the audio half are counted and never read. The scale is ".alpha" / rank; else what the
    settings of PEFT say, which Diffusers writes into the header and PEFT into adapter_config.json
    beside the file; else 1. Raises ValueError naming the keys that are unknown, double, without
    partner, or do not fit the model; when nothing is left; and for PEFT's keys without an alpha.
    """
    spellings, linears = _spellings(model), _linears(model)
    found: dict[str, dict[str, tuple[str, Tensor]]] = {}  # name -> "A", "B", "alpha" -> key, tensor
    unknown, audio_keys = [], 0
    with open_file(path) as file:
        metadata = dict(file.metadata() or {})
        for key in sorted(file.keys()):
            spelled = PREFIXES.sub("", key, count=1)
            ending = next((ending for ending in ENDINGS if spelled.endswith(ending)), "")
            name = spellings.get(spelled.removesuffix(ending))
            if _is_audio(spelled):
                audio_keys += 1
            elif name is None or not ending:
                unknown.append(f"{key!r:.80}")
            else:
                parts, part = found.setdefault(name, {}), ENDINGS[ending]
                if part in parts:
                    raise ValueError(f"expected {name} once, got {key!r} and {parts[part][0]!r}; "
                                     "remove one")
                parts[part] = key, file.get_tensor(key)
    if unknown:
        names = ", ".join(unknown[:3])
        names += f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise ValueError(f"expected LoRA keys of linears in this model, got {names}; "
                         "use a LoRA made for LTX-2.3")
    if not found:
        raise ValueError(f"expected LoRA tensors in {path}, got none ({audio_keys} for audio); "
                         "use another file")
    keys = [key for parts in found.values() for key, _ in parts.values()]
    settings = _settings(Path(path), metadata, any(map(PEFT_KEY.match, keys)))
    pairs = {name: _pair(name, parts, linears[name], settings) for name, parts in found.items()}
    return LoRAFile(pairs, metadata, audio_keys)


def _spellings(model: nn.Module) -> dict[str, str]:
    """Every way to write the name of a linear, prefixes aside -> its name in the model."""
    table = {}
    for name in _linears(model):
        theirs = name
        for ltx, diffusers in RENAMED.items():
            theirs = theirs.replace(ltx, diffusers)
        for spelled in (name, theirs):
            table[spelled] = table["lora_unet_" + spelled.replace(".", "_")] = name
    return table


def _is_audio(name: str) -> bool:
    """LTX-2.3: of the audio half or the paths between the halves (Diffusers: "av_cross_attn")."""
    name = name.removeprefix("lora_unet_")
    between = name.startswith(("av_ca_", "av_cross_attn_"))
    return between or any(part in name for part in ("audio", "a2v_ca", "v2a_ca"))


def _settings(path: Path, metadata: dict[str, str], peft: bool) -> dict | None:
    """PEFT's settings: of the header entry that Diffusers writes, else, for PEFT's own keys, of the
    file beside. {}: there are none and need be none; None: PEFT's keys without. Raises ValueError
    for what is no plain LoRA."""
    where, text = "'lora_adapter_metadata'", metadata.get("lora_adapter_metadata")
    if text is None:
        where = path.parent / "adapter_config.json"
        if not (peft and where.is_file()):
            return None if peft else {}
    try:
        text = read_text(where) if text is None else text
        config = {key.removeprefix("transformer."): v for key, v in parse_json(text).items()}
        alphas = {end: float(a) for end, a in (config.get("alpha_pattern") or {}).items()}
        config |= {"lora_alpha": float(config["lora_alpha"]), "alpha_pattern": alphas}
        ranks = {config.get("r"), *(config.get("rank_pattern") or {}).values()}
    except (ValueError, TypeError, AttributeError, OverflowError, KeyError) as error:
        told = one_line(f"no {error}" if isinstance(error, KeyError) else error)
        raise ValueError(f"expected JSON with PEFT's settings in {where}, got {told}; "
                         "get it again") from error
    for key, value in config.items():
        usual = key in READ | HARMLESS or value in USUAL.get(key, ())
        if key == "alpha_pattern":  # PEFT takes regular expressions
            usual = all(re.fullmatch(r"[\w.]+", end) for end in value)
        if value and not usual:
            raise ValueError(f"expected a plain LoRA, got {key} = {one_line(value, 40)} in "
                             f"{where}; merge it with PEFT, or convert it")
    for name, alpha in (("lora_alpha", config["lora_alpha"]), *alphas.items()):
        if not math.isfinite(alpha):
            raise ValueError(f"expected a number for {name} in {where}, got {alpha}; get it again")
    return config | {"ranks": ranks}


def _scale(settings: dict | None, key: str, rank: int) -> float:
    """How strong B @ A is for the linear whose key this is, up to ".lora_A"."""
    if settings is None:
        raise ValueError("expected PEFT's adapter_config.json beside the file, which says how "
                         f"strong it is, got none, and no alpha for {key!r:.80}; put it there")
    if not settings:
        return 1.0
    if settings.get("r") and rank not in settings["ranks"]:
        raise ValueError(f"expected a rank out of {one_line(settings['ranks'], 40)} as PEFT's "
                         f"settings say, got {rank} for {key!r:.80}; they belong to another LoRA")
    alpha = next((a for end, a in settings["alpha_pattern"].items()
                  if f".{key}".endswith(f".{end}")), settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _pair(name: str, parts: dict, linear: nn.Module, settings: dict | None
          ) -> tuple[Tensor, Tensor, float]:
    """A, B and scale of one linear, checked against it."""
    if "A" not in parts or "B" not in parts:
        keys = ", ".join(repr(key) for key, _ in parts.values())
        raise ValueError(f"expected lora_A and lora_B (or lora_down and lora_up) of {name}, "
                         f"got {keys} without partner")
    (key_A, A), (key_B, B) = parts["A"], parts["B"]
    rank = A.shape[0] if A.ndim == 2 else 0
    weight = (linear.out_features, linear.in_features)
    if not rank or A.shape != (rank, weight[1]) or B.shape != (weight[0], rank):
        found = f"{key_A!r} {one_line(tuple(A.shape))} and {key_B!r} {one_line(tuple(B.shape))}"
        raise ValueError(f"expected (rank, in) and (out, rank) for a weight {weight}, got {found}; "
                         "check the model size")
    if "alpha" not in parts:
        return A, B, _scale(settings, key_A.partition(".lora")[0], rank)
    key, tensor = parts["alpha"]
    if tensor.numel() != 1:
        raise ValueError(f"expected one number in {key!r}, got shape "
                         f"{one_line(tuple(tensor.shape))}; the file is damaged")
    alpha = tensor.item()
    if not math.isfinite(alpha) or alpha == 0:  # kohya reads 0 as the rank, ComfyUI as no strength
        raise ValueError(f"expected a number but 0 in {key!r}, got {alpha}; the file is damaged")
    return A, B, alpha / rank


# ---------------------------------------------------------------- using one


def parse_loras(given: Sequence[Sequence[str]]) -> list[tuple[str, float]]:
    """What --lora PATH [STRENGTH] was given, every time: path and strength. Raises ValueError."""
    loras = []
    for words in given:
        path, strength = [*words, "1"][:2]
        try:
            number = float(strength)
        except ValueError:
            number = math.nan
        if len(words) > 2 or not math.isfinite(number):
            raise ValueError(f"expected --lora PATH [STRENGTH], got {' '.join(words)}; "
                             "use for example 1.0")
        if not os.path.isfile(path):
            raise ValueError(f"expected a LoRA file, got no file at {path}; check --lora")
        loras.append((path, number))
    return loras


def _fused(weight: Tensor, pairs: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """weight (out, in) + the sum of scale * B @ A, in float32 on the weight's device."""
    total = weight.to(torch.float32, copy=True)
    for A, B, scale in pairs:
        total.addmm_(B.to(total), A.to(total), alpha=scale)
    return total


def lora_changes(model: nn.Module, loras: Sequence[tuple[str | os.PathLike, float]]
                 ) -> Callable[[str, Tensor], Tensor] | None:
    """Fuse while loading: the `change` for checkpoint.load_weights that adds all (path, strength).

    The model may be on the meta device; names are relative to it. Each sum is made in float32 and
    rounded once; a tensor that no LoRA touches is returned as it is. None when there is nothing to
    add (no files, or all at strength 0). Raises ValueError like read_lora, before anything loads.
    """
    pairs: dict[str, list] = {}
    for path, strength in loras:
        for name, (A, B, scale) in read_lora(path, model).pairs.items():
            if strength != 0:
                pairs.setdefault(f"{name}.weight", []).append((A, B, strength * scale))
    if not pairs:
        return None
    return lambda name, tensor: _fused(tensor, pairs[name]) if name in pairs else tensor


@torch.no_grad()
def load_lora(model: nn.Module, path: str | os.PathLike, strength: float = 1.0) -> dict[str, str]:
    """Add strength * scale * B @ A of a LoRA file into a loaded model; returns its metadata.

    Call it again for the next LoRA. Raises ValueError like read_lora, before a weight changes.
    """
    lora, linears = read_lora(path, model), _linears(model)
    for name, (A, B, scale) in lora.pairs.items() if strength != 0 else ():
        weight = linears[name].weight
        weight.copy_(_fused(weight, [(A, B, strength * scale)]))
    return lora.metadata


def _demo() -> None:
    """How small a LoRA of the real model is, and that it is the same when fused."""
    import tempfile

    from model import TransformerConfig, VideoTransformer

    with torch.device("meta"):
        model = VideoTransformer(TransformerConfig())
    print(f"LTX-2.3's video transformer: {sum(p.numel() for p in model.parameters()):,} weights; "
          f"its LoRA of rank 32: {sum(p.numel() for p in add_lora(model)):,}")
    torch.manual_seed(0)
    base, trained = (nn.ModuleDict({"to_q": nn.Linear(16, 16)}) for _ in range(2))
    trained.load_state_dict(base.state_dict())
    nn.init.normal_(add_lora(trained, rank=2, alpha=2, targets=["to_q"])[1])
    x = torch.randn(4, 16)
    before, wanted = base["to_q"](x), trained["to_q"](x)
    with tempfile.TemporaryDirectory() as folder:
        save_lora(f"{folder}/lora.safetensors", trained)
        load_lora(base, f"{folder}/lora.safetensors")
    apart = (base["to_q"](x) - wanted).abs().max()
    print(f"one linear: the LoRA moves its output by {(wanted - before).abs().max():.1f}, "
          f"saved and fused into another copy it differs by {apart:.1e}")
    print("Notice: 1 % of the weights are trained, and using them costs nothing once fused.")


if __name__ == "__main__":
    _demo()
