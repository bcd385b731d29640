"""Gemma 3, text only: ids -> the hidden states after every layer. LTX-2.3 uses the 12B model.

The idea. A language model that was trained to guess the next word knows what a prompt means. Which
of its layers knows what depends on the subject, so the states of all layers are handed on; text.py
mixes them. Two traps: five layers of six see only the last words, and the two kinds of layers have
rotary angles of their own; and a norm's weight is stored as its deviation from one, so a norm that
multiplies by the stored number alone silences everything.

paper: ST-DRC, arXiv 2606.02441, overview figure: the Gemma 3 text encoder is frozen.
LTX-2.3: everything else. Names match the Hugging Face folders, so real weights load unchanged.

Conventions. mask (B, N), 1 = real token, 0 = padding, which is on the left. states: layers + 1
tensors (B, N, Dg), Dg Gemma's width: scaled embeddings first, the last one after its norm. The
states of padded places mean nothing, and no real token reads them.

    gemma = load_gemma("gemma-3-12b-it", dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        states = gemma(ids, mask)                # 49 x (B, N, 3840)

    python -m ltx.gemma                          # who may read whom

Read next: ltx/text.py
"""

import copy
import json
import os
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.files import atomic_write, one_line
from ltx.checkpoint import (
    MOST_LAYERS,
    Entry,
    check_table,
    open_file,
    read_tensor,
    write_file,
)
from ltx.offload import stream_blocks
from ltx.tokenizer import read_object

SLIDING, FULL = "sliding_attention", "full_attention"  # config.json's names for kinds of layers
# What config.json may leave out, and must not say otherwise: this file does it in one way only.
FIXED = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False,
         "attn_logit_softcapping": None, "use_bidirectional_attention": False}


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes of a Gemma 3 text model. The defaults are those that Gemma's config files leave out.

    LTX-2.3: hidden 3840, 48 layers, 16 query and 8 key/value heads of 256, MLP 15360, window 1024.
    """

    vocab_size: int = 262_208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256  # not hidden_size / heads: in the 12B model q is 4096 wide, the state 3840
    query_pre_attn_scalar: float = 256.0  # scores are divided by its square root
    sliding_window: int = 4096
    rms_norm_eps: float = 1e-6
    layer_types: tuple[str, ...] = ()  # SLIDING or FULL per layer; () = every sixth is full
    local_theta: float = 10_000.0  # rotary base of the sliding layers
    global_theta: float = 1_000_000.0  # ... of the full layers,
    global_factor: float = 1.0  # ... whose frequencies are divided by this (8 in the 12B model)

    def __post_init__(self):
        if not self.layer_types:
            object.__setattr__(self, "layer_types", _layer_types(self.num_hidden_layers, 6))
        layers, kinds = self.num_hidden_layers, self.layer_types
        if len(kinds) != layers:
            raise ValueError(f"expected {layers} layer_types, got {len(kinds)}; fix config")
        if unknown := [f"{kind!r:.40}" for kind in kinds if kind not in (SLIDING, FULL)]:
            raise ValueError(f"expected {SLIDING} or {FULL}, got {unknown[0]}; fix config.json")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError("expected query heads a multiple of key/value heads and an even "
                             "head_dim; fix config.json")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "GemmaConfig":
        """From `config.json` of a Hugging Face folder. Raises ValueError if it is no Gemma 3's."""
        path = Path(folder) / "config.json"
        data = read_object(path)
        try:
            return cls.from_dict(data)
        except (TypeError, AttributeError, ArithmeticError) as error:  # a list for an object, ...
            raise ValueError(f"expected the settings of a Gemma 3 in {path}, "
                             f"got {one_line(error)}; fetch it again") from error

    @classmethod
    def from_dict(cls, config: dict) -> "GemmaConfig":
        """From config.json's content: multimodal or text-only, with old or new rotary settings.

        Raises ValueError for another family of models, and for what no released Gemma 3 uses.
        """
        config = config.get("text_config", config)
        kind = config.get("model_type", "gemma3_text")
        if kind not in ("gemma3", "gemma3_text"):
            raise ValueError("expected model_type gemma3 or gemma3_text, "
                             f"got {one_line(kind, 40)}; use a Gemma 3 folder")
        for key, value in FIXED.items():
            if (config.get(key) or value) != value:
                raise ValueError(f"expected {key} = {value}, got {one_line(config[key], 40)}; "
                                 "use a Gemma 3 text model")
        new = config.get("rope_parameters") or {}
        full = new.get(FULL) or config.get("rope_scaling") or {}
        local = new.get(SLIDING) or {}
        for kind in (full.get("rope_type", full.get("type")), local.get("rope_type")):
            if kind not in (None, "default", "linear") or (local.get("factor") or 1) != 1:
                raise ValueError("expected linear rotary scaling on full layers only, got "
                                 f"{one_line(kind, 40)}; use Gemma 3")
        values = {name: config[name] for name in SIZES if config.get(name) is not None}
        rotary = {"global_theta": full.get("rope_theta") or config.get("rope_theta"),
                  "local_theta": local.get("rope_theta") or config.get("rope_local_base_freq"),
                  "global_factor": full.get("factor")}
        values |= {name: value for name, value in rotary.items() if value}
        _check_numbers(values)
        layers = values.get("num_hidden_layers", cls.num_hidden_layers)
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        kinds = tuple(config.get("layer_types") or _layer_types(layers, pattern))
        return cls(layer_types=kinds, **values)

    def to_dict(self) -> dict:
        """A text-only config.json that both this file and the transformers library read."""
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            **{name: getattr(self, name) for name in SIZES},
            "layer_types": list(self.layer_types),
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": self.global_theta,
            "rope_local_base_freq": self.local_theta,
            "rope_scaling": {"rope_type": "linear", "factor": self.global_factor},
            "tie_word_embeddings": True,
        }


TYPE_OF = {field.name: field.type for field in fields(GemmaConfig) if field.type in (int, float)}
SIZES = [name for name in TYPE_OF if not name.endswith(("_theta", "_factor"))]  # also config.json's


def _check_numbers(values: dict) -> None:
    """Every size a number, above 0 and not absurd: a billion layers would be built for ever."""
    for name, value in values.items():
        kind, word = TYPE_OF[name], "an integer" if TYPE_OF[name] is int else "a number"
        most = MOST_LAYERS if name == "num_hidden_layers" else 1e6 if kind is int else 1e12
        if type(value) not in (int, kind) or not 0 < value <= most:  # NaN fails too
            raise ValueError(f"expected {word} above 0 and up to {most:g} for {name}, "
                             f"got {value!r:.40}; download config.json again")


def _layer_types(layers: int, pattern: int) -> tuple[str, ...]:
    return tuple(SLIDING if (i + 1) % pattern else FULL for i in range(layers))


class GemmaNorm(nn.Module):
    """RMS norm in float32 with weight 1 + w, so stored zeros mean "no change"."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) -> the same shape and type."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return (y * (1 + self.weight.float())).to(x.dtype)


class GemmaAttention(nn.Module):
    """Grouped-query attention: `groups` query heads share a key/value head; norms are per head."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        width, hd = config.hidden_size, config.head_dim
        self.hd = hd
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        self.groups = heads // shared
        self.scale = config.query_pre_attn_scalar**-0.5
        self.q_proj = nn.Linear(width, heads * hd, bias=False)
        self.k_proj = nn.Linear(width, shared * hd, bias=False)
        self.v_proj = nn.Linear(width, shared * hd, bias=False)
        self.o_proj = nn.Linear(heads * hd, width, bias=False)
        self.q_norm = GemmaNorm(hd, config.rms_norm_eps)
        self.k_norm = GemmaNorm(hd, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], allowed: Tensor) -> Tensor:
        """x (B, N, Dg), rotary cos and sin (N, hd/2), allowed (B, 1, N, N) -> (B, N, Dg)."""
        B, N, _ = x.shape
        q, k, v = (project(x).view(B, N, -1, self.hd).transpose(1, 2)
                   for project in (self.q_proj, self.k_proj, self.v_proj))
        q = rotate_halves(self.q_norm(q), *rotary)                # (B, nh, N, hd)
        k = rotate_halves(self.k_norm(k), *rotary)                # (B, nh / groups, N, hd)
        k = k.repeat_interleave(self.groups, dim=1)               # (B, nh, N, hd)
        v = v.repeat_interleave(self.groups, dim=1).to(q.dtype)   # (B, nh, N, hd)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=self.scale)
        return self.o_proj(out.transpose(1, 2).reshape(B, N, -1))  # (B, N, Dg)


class GemmaMLP(nn.Module):
    """Gated feed-forward."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.gelu(self.gate_proj(x), approximate="tanh")  # (B, N, hidden)
        return self.down_proj(gate * self.up_proj(x))         # (B, N, Dg)


class GemmaLayer(nn.Module):
    """Attention and feed-forward, each between two norms: of its input, of what it adds."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.self_attn = GemmaAttention(config)
        self.mlp = GemmaMLP(config)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = GemmaNorm(width, eps)
        self.post_attention_layernorm = GemmaNorm(width, eps)
        self.pre_feedforward_layernorm = GemmaNorm(width, eps)
        self.post_feedforward_layernorm = GemmaNorm(width, eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], allowed: Tensor) -> Tensor:
        y = self.self_attn(self.input_layernorm(x), rotary, allowed)  # (B, N, Dg)
        x = x + self.post_attention_layernorm(y)                      # (B, N, Dg)
        y = self.mlp(self.pre_feedforward_layernorm(x))               # (B, N, Dg)
        return x + self.post_feedforward_layernorm(y)                 # (B, N, Dg)


class GemmaTextModel(nn.Module):
    """Gemma 3 without vision tower and output layer."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # our reading: trained from scratch, embeddings have deviation 1 after the factor sqrt(Dg).
        nn.init.normal_(self.embed_tokens.weight, std=config.hidden_size**-0.5)
        self.layers = nn.ModuleList(GemmaLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = GemmaNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """ids, mask (B, N) -> all states: num_hidden_layers + 1 tensors (B, N, Dg), see above."""
        config, N = self.config, ids.shape[1]
        x = self.embed_tokens(ids)  # (B, N, Dg)
        # LTX-2.3 (Gemma): the factor is rounded to the weights' type: 62.0 in bf16, not 61.97.
        x = x * torch.tensor(config.hidden_size**0.5, dtype=x.dtype, device=x.device)  # (B, N, Dg)
        allowed = {FULL: attention_allowed(mask, N),
                   SLIDING: attention_allowed(mask, config.sliding_window)}  # (B, 1, N, N) each
        rotary = {FULL: _angles(N, config.head_dim, config.global_theta, config.global_factor, x),
                  SLIDING: _angles(N, config.head_dim, config.local_theta, 1.0, x)}
        states = [x]
        for layer, kind in zip(self.layers, config.layer_types, strict=True):
            x = layer(x, rotary[kind], allowed[kind])  # (B, N, Dg)
            states.append(x)
        states[-1] = self.norm(x)
        return tuple(states)


def attention_allowed(mask: Tensor, window: int) -> Tensor:
    """Which query (row) may read which key (column): (B, N) mask -> (B, 1, N, N) bool.

    LTX-2.3: query q reads key k when q - window < k <= q and k is not padding. A padded query may
    also read itself: the softmax of a row without keys is NaN, which would spread in training.
    """
    place = torch.arange(mask.shape[-1], device=mask.device)
    query, key = place[:, None], place[None, :]
    near = (key <= query) & (key > query - window)  # (N, N)
    return ((near & (mask[:, None, :] > 0)) | (key == query))[:, None]


def _angles(N: int, hd: int, theta: float, factor: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, (N, hd/2) each. Positions count padding: only their differences matter."""
    pair = torch.arange(0, hd, 2, device=like.device, dtype=torch.float32)  # (hd/2,)
    place = torch.arange(N, device=like.device, dtype=torch.float32)        # (N,)
    angle = place[:, None] * (theta ** (-pair / hd) / factor)               # (N, hd/2)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gemma's rotary embedding: element i is paired with element i + hd/2.

    x (..., N, hd), cos and sin (N, hd/2), the same for all heads -> (..., N, hd).
    """
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


GEMMA_PREFIXES = (
    "language_model.model.",  # the multimodal folders on the hub
    "model.language_model.",  # the same, saved again by a recent transformers
    "model.",  # text-only folders
    "",  # a bare text model
)


def load_gemma(folder: str | os.PathLike, dtype: torch.dtype | None = None,
               device: str | torch.device = "cpu", offload: str = "none") -> GemmaTextModel:
    """Gemma 3 from a Hugging Face folder: config.json and one or several safetensors files.

    dtype None keeps what is stored. offload "cpu" or "disk": layers come one by one, see
    offload.py. Vision tower and output layer are never read. Raises ValueError, before a number is
    read, for a missing, damaged or foreign file and for a tensor that check_table refuses.
    """
    folder = Path(folder)
    with torch.device("meta"):
        gemma = GemmaTextModel(GemmaConfig.from_folder(folder))
    where, table, prefix = _find_gemma(folder, gemma.state_dict())

    def fill(module: nn.Module, stem: str, onto: str | torch.device) -> nn.Module:
        """The tensors of one part, whichever of the files they are in."""
        with ExitStack() as stack:
            files = {path: stack.enter_context(open_file(path, onto))
                     for path in set(where.values())}

            def get(name: str) -> Tensor:
                return files[where[name]].get_tensor(name)

            tensors = {name: read_tensor(get, table, prefix + stem + name).to(dtype=dtype)
                       for name in module.state_dict()}
        module.load_state_dict(tensors, strict=True, assign=True)
        return module

    if offload == "none":
        return fill(gemma, "", device)
    empty, gemma.layers = gemma.layers, nn.ModuleList()
    fill(gemma, "", device)

    def layer(i: int, onto: torch.device) -> nn.Module:
        return fill(copy.deepcopy(empty[i]), f"layers.{i}.", onto)

    gemma.layers = stream_blocks(len(empty), layer, device, offload)
    return gemma


def _find_gemma(folder: Path, expected: dict[str, Tensor]
                ) -> tuple[dict[str, Path], dict[str, Entry], str]:
    """Which file holds which tensor, the rows of all their tables, and what stands in front of our
    names. Raises ValueError."""
    where, table = {}, {}
    for path in _gemma_files(folder):
        with open_file(path) as file:
            table |= file.table
            where |= dict.fromkeys(file.table, path)
    prefix = next((p for p in GEMMA_PREFIXES if p + "embed_tokens.weight" in table), None)
    if prefix is None:
        raise ValueError(f"expected '...embed_tokens.weight' in {folder}, got none; "
                         "is this a Gemma 3 folder?")
    check_table(table, expected, prefix, folder, "the whole folder in bf16")
    return where, table, prefix


def _gemma_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index lists, else the single one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"expected a 'weight_map' in {index}, got none; download it again")
    if outside := [name for name in listed.values() if Path(name).name != name]:
        raise ValueError(f"expected names of files beside {index}, got {outside[0]!r:.80}; "
                         "download it again")
    files = [folder / name for name in sorted(set(listed.values()))]
    if absent := [path.name for path in files if not path.is_file()]:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ValueError(f"expected the {len(files)} files of {index}, got no {absent[0]}{more}; "
                         "download the whole Gemma folder")
    return files


def save_gemma(folder: str | os.PathLike, gemma: GemmaTextModel, tokenizer: dict,
               dtype: torch.dtype | None = None) -> None:
    """Write a text-only Hugging Face folder that load_gemma reads.

    tokenizer: the content of tokenizer.json. dtype: type on disk, None keeps the model's.
    """
    settings = {"config.json": json.dumps(gemma.config.to_dict(), indent=1),
                "tokenizer.json": json.dumps(tokenizer, ensure_ascii=False, indent=1)}
    for name, text in settings.items():
        atomic_write(Path(folder) / name, lambda path, text=text: path.write_text(text, "utf-8"))
    tensors = {"model." + name: t.to(dtype=dtype) for name, t in gemma.state_dict().items()}
    write_file(Path(folder) / "model.safetensors", tensors, {"format": "pt"})


def _demo() -> None:
    """A small random Gemma: shapes, and who may read whom in the two kinds of layers."""
    config = GemmaConfig(vocab_size=9, hidden_size=64, intermediate_size=128, num_hidden_layers=6,
                         head_dim=16, sliding_window=3)
    ids = torch.tensor([[0, 0, 2, 4, 5, 6, 7, 8]])
    with torch.no_grad():
        states = GemmaTextModel(config)(ids, ids > 0)
    print(f"ids {tuple(ids.shape)} -> {len(states)} states of {tuple(states[0].shape)}")
    print("who (row) may read whom (column), two places of padding first:")
    for kind, window in ((SLIDING, config.sliding_window), (FULL, ids.shape[1])):
        print(f"{kind}, layers {[i for i, k in enumerate(config.layer_types) if k == kind]}")
        for row in attention_allowed(ids > 0, window)[0, 0].int().tolist():
            print("  " + "".join(".1"[allowed] for allowed in row))
    print("Notice: nobody reads a later word, so prompts that begin alike begin with equal states.")


if __name__ == "__main__":
    _demo()
