"""Gemma 3, text only: ids -> the hidden states after every layer. LTX-2.3 uses the 12B model, frozen.

The idea. A language model that was trained to guess the next word knows what a prompt means. Which of its layers knows
what depends on the subject, so the states of all layers are handed on (text.py mixes them). Two traps: five layers of
six see only a window of the last words, and the two kinds have rotary angles of their own; and weights are stored as
deviations from one, so a norm that multiplies by the stored number alone silences everything.

paper: ST-DRC, arXiv 2606.02441, overview figure: the Gemma 3 text encoder is frozen.
LTX-2.3: everything else here. Names match the Hugging Face folders, so real weights load unchanged.

Conventions
  mask     (B, N), 1 = real token, 0 = padding, which is on the left
  states   tuple of layers + 1 tensors (B, N, Dg), Dg Gemma's width: scaled embeddings first, last one after its norm
  The states of padded rows are meaningless (they depend on the attention kernel); nothing here lets them through.

    gemma = load_gemma("gemma-3-12b-it", dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        states = gemma(ids, mask)                                 # 49 x (B, N, 3840)

    python -m ltx.gemma                                               # who may read whom, layer by layer

Read next: text.py
"""

import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from common.files import one_line
from ltx.checkpoint import MOST_LAYERS, TYPES, open_file
from ltx.offload import stream_blocks
from ltx.tokenizer import read_object


@dataclass(frozen=True)
class GemmaConfig:
    """Sizes of a Gemma 3 text model. The defaults are those that Gemma's config files leave out.

    LTX-2.3 uses the 12B model: hidden 3840, 48 layers, 16 query and 8 key/value heads of 256, MLP 15360, window 1024.
    """

    vocab_size: int = 262_208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256  # not hidden_size / heads: in the 12B model q is 4096 wide and the hidden state 3840
    query_pre_attn_scalar: float = 256.0  # scores are divided by its square root
    sliding_window: int = 4096
    rms_norm_eps: float = 1e-6
    layer_types: tuple[str, ...] = ()  # "sliding_attention" or "full_attention" per layer; () = every sixth is full
    local_theta: float = 10_000.0  # rotary base of the sliding layers
    global_theta: float = 1_000_000.0  # ... of the full layers,
    global_factor: float = 1.0  # ... whose frequencies are divided by this (8 in the released models)

    def __post_init__(self):
        if not self.layer_types:
            object.__setattr__(self, "layer_types", _layer_types(self.num_hidden_layers, 6))
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"expected {self.num_hidden_layers} layer_types, got {len(self.layer_types)}; fix config")
        if unknown := [kind for kind in self.layer_types if kind not in ("sliding_attention", "full_attention")]:
            raise ValueError(f"expected sliding_attention or full_attention, got {unknown[0]!r:.40}; fix config.json")
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError("expected query heads a multiple of key/value heads and an even head_dim; fix config.json")

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "GemmaConfig":
        """Read `config.json` of a Hugging Face folder. Raises ValueError when it is absent or no Gemma 3."""
        path = Path(folder) / "config.json"
        data = read_object(path)
        try:
            return cls.from_dict(data)
        except (TypeError, AttributeError, ArithmeticError) as error:  # a list where an object belongs, and so on
            raise ValueError(f"expected the settings of a Gemma 3 in {path}, got {one_line(error)}; fetch it again") from error

    @classmethod
    def from_dict(cls, config: dict) -> "GemmaConfig":
        """From the content of config.json: multimodal or text-only, with old or new names for the rotary settings.

        Raises ValueError for another family of models, and for settings that no released Gemma 3 uses (attention bias,
        score soft-capping, ...).
        """
        config = config.get("text_config", config)
        if (kind := config.get("model_type", "gemma3_text")) not in ("gemma3", "gemma3_text"):
            raise ValueError(f"expected model_type gemma3 or gemma3_text, got {one_line(kind, 40)}; use a Gemma 3 folder")
        wanted = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attn_logit_softcapping": None,
                  "use_bidirectional_attention": False}  # fmt: skip
        for key, value in wanted.items():
            if (config.get(key) or value) != value:
                raise ValueError(f"expected {key} = {value}, got {one_line(config[key], 40)}; use a Gemma 3 text model")
        same_name = [n for n in cls.__dataclass_fields__ if not n.endswith(("_theta", "_factor", "_types"))]
        values = {name: config[name] for name in same_name if config.get(name) is not None}
        cls._check_numbers(values)
        layers = values.get("num_hidden_layers", cls.num_hidden_layers)
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        values["layer_types"] = tuple(config.get("layer_types") or _layer_types(layers, pattern))
        new = config.get("rope_parameters") or {}
        scaling = new.get("full_attention") or config.get("rope_scaling") or {}
        local = new.get("sliding_attention") or {}
        for kind in (scaling.get("rope_type", scaling.get("type")), local.get("rope_type")):
            if kind not in (None, "default", "linear") or (local.get("factor") or 1) != 1:
                raise ValueError(f"expected linear rotary scaling on full layers only, got {one_line(kind, 40)}; use Gemma 3")
        values["global_theta"] = scaling.get("rope_theta") or config.get("rope_theta") or cls.global_theta
        values["local_theta"] = local.get("rope_theta") or config.get("rope_local_base_freq") or cls.local_theta
        values["global_factor"] = scaling.get("factor") or 1.0
        cls._check_numbers(values)
        return cls(**values)

    @classmethod
    def _check_numbers(cls, values: dict) -> None:
        """Every size a number of its kind, above 0 and not absurd: a billion layers would be built for ever."""
        for name, value in values.items():
            kind = cls.__dataclass_fields__[name].type
            most = MOST_LAYERS if name == "num_hidden_layers" else 1e6 if kind is int else 1e12
            if kind in (int, float) and (type(value) not in (int, kind) or not 0 < value <= most):  # NaN fails too
                raise ValueError(f"expected {'an integer' if kind is int else 'a number'} above 0 and up to {most:g} for "
                                 f"{name}, got {value!r:.40}; download config.json again")

    def to_dict(self) -> dict:
        """The content of a text-only config.json that both this file and the transformers library read."""
        same_name = [n for n in self.__dataclass_fields__ if not n.endswith(("_theta", "_factor"))]
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            **{name: getattr(self, name) for name in same_name},
            "layer_types": list(self.layer_types),
            "hidden_activation": "gelu_pytorch_tanh",
            "rope_theta": self.global_theta,
            "rope_local_base_freq": self.local_theta,
            "rope_scaling": {"rope_type": "linear", "factor": self.global_factor},
            "tie_word_embeddings": True,
        }


def _layer_types(layers: int, pattern: int) -> tuple[str, ...]:
    return tuple("sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(layers))


class GemmaNorm(nn.Module):
    """RMS norm in float32 with weight 1 + w: stored weights are deviations from one, so zeros mean "no change"."""

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
    """Grouped-query attention: key/value head j serves `groups` query heads. Norms are per head, unlike LTX's."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        width, hd = config.hidden_size, config.head_dim
        self.hd = hd
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.scale = config.query_pre_attn_scalar**-0.5
        self.q_proj = nn.Linear(width, config.num_attention_heads * hd, bias=False)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * hd, bias=False)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * hd, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * hd, width, bias=False)
        self.q_norm = GemmaNorm(hd, config.rms_norm_eps)
        self.k_norm = GemmaNorm(hd, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], allowed: Tensor) -> Tensor:
        """x (B, N, Dg), rotary cos and sin (N, hd/2), allowed (B, 1, N, N) -> (B, N, Dg)."""
        B, N, _ = x.shape
        q = self.q_proj(x).view(B, N, -1, self.hd).transpose(1, 2)  # (B, nh, N, hd)
        k = self.k_proj(x).view(B, N, -1, self.hd).transpose(1, 2)  # (B, nh / groups, N, hd)
        v = self.v_proj(x).view(B, N, -1, self.hd).transpose(1, 2)  # (B, nh / groups, N, hd)
        q = rotate_halves(self.q_norm(q), *rotary)  # (B, nh, N, hd)
        k = rotate_halves(self.k_norm(k), *rotary).repeat_interleave(self.groups, dim=1)  # (B, nh, N, hd)
        v = v.repeat_interleave(self.groups, dim=1)  # (B, nh, N, hd)
        out = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=allowed, scale=self.scale)
        return self.o_proj(out.transpose(1, 2).reshape(B, N, -1))  # (B, N, Dg)


class GemmaMLP(nn.Module):
    """Gated feed-forward."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))  # (B, N, Dg)


class GemmaLayer(nn.Module):
    """Attention and feed-forward, each between two norms: one on what goes in, one on what is added back."""

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
        x = x + self.post_attention_layernorm(y)  # (B, N, Dg)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))  # (B, N, Dg)


class GemmaTextModel(nn.Module):
    """Gemma 3 without its vision tower and its output layer (names as after `model.` in a checkpoint)."""

    def __init__(self, config: GemmaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # our reading, for training from scratch only: after the factor sqrt(Dg) embeddings start with deviation 1.
        nn.init.normal_(self.embed_tokens.weight, std=config.hidden_size**-0.5)
        self.layers = nn.ModuleList(GemmaLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = GemmaNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """All hidden states of a batch of padded prompts.

        ids, mask: (B, N). Returns num_hidden_layers + 1 tensors (B, N, Dg): the scaled embeddings, the output of every
        layer but the last, and the last one after the final norm. Rows where mask is 0 are finite but mean nothing.
        """
        config, N = self.config, ids.shape[1]
        allowed = {
            "full_attention": attention_allowed(mask, N),
            "sliding_attention": attention_allowed(mask, config.sliding_window),
        }  # each (B, 1, N, N)
        x = self.embed_tokens(ids)  # (B, N, Dg)
        # LTX-2.3 (Gemma): the factor itself is rounded to the weights' type: 62.0 in bf16 for the 12B, not 61.97.
        x = x * torch.tensor(config.hidden_size**0.5, dtype=x.dtype, device=x.device)  # (B, N, Dg)
        rotary = {
            "full_attention": _angles(N, config.head_dim, config.global_theta, config.global_factor, x),
            "sliding_attention": _angles(N, config.head_dim, config.local_theta, 1.0, x),
        }
        states = [x]
        for layer, kind in zip(self.layers, config.layer_types, strict=True):
            x = layer(x, rotary[kind], allowed[kind])  # (B, N, Dg)
            states.append(x)
        states[-1] = self.norm(x)
        return tuple(states)


def attention_allowed(mask: Tensor, window: int) -> Tensor:
    """Which query (row) may read which key (column): (B, N) mask -> (B, 1, N, N) bool.

    LTX-2.3 (Gemma): key k is read by query q when q - window < k <= q and k is not padding. A padded query may also
    read itself: a row without any key would be a softmax over nothing, and its NaN would spread in training.
    """
    place = torch.arange(mask.shape[-1], device=mask.device)
    query, key = place[:, None], place[None, :]
    near = (key <= query) & (key > query - window)  # (N, N)
    return ((near & (mask[:, None, :] > 0)) | (key == query))[:, None]


def _angles(length: int, hd: int, theta: float, factor: float, like: Tensor) -> tuple[Tensor, Tensor]:
    # Positions count padding too; only differences matter. cos and sin: (N, hd/2), computed in float32.
    pair = torch.arange(0, hd, 2, device=like.device, dtype=torch.float32)
    frequency = theta ** (-pair / hd) / factor
    angle = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * frequency
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gemma's rotary embedding: element i is paired with element i + hd/2. x: (..., N, hd), cos and sin (N, hd/2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


GEMMA_PREFIXES = (
    "language_model.model.",  # the multimodal folders on the hub
    "model.language_model.",  # the same, saved again by a recent transformers
    "model.",  # text-only folders
    "",  # a bare text model
)


def load_gemma(
    folder: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    offload: str = "none",
) -> GemmaTextModel:
    """Gemma 3 from a Hugging Face folder: config.json and one or several safetensors files.

    dtype None keeps what is stored. offload "cpu" or "disk": layers come one by one, see memory.py. Vision tower and
    output layer are never read. Names and shapes are checked before the first number is. Raises ValueError for a folder
    that lacks a file, for a file that is cut off or of another kind, and for a missing or misshapen tensor (naming it).
    """
    folder = Path(folder)
    with torch.device("meta"):
        gemma = GemmaTextModel(GemmaConfig.from_folder(folder))
    where, prefix = _find_gemma(folder, gemma.state_dict())

    def fill(module: nn.Module, stem: str, onto: str | torch.device) -> nn.Module:
        """The tensors of one part, whichever of the files they are in."""
        names, tensors = list(module.state_dict()), {}
        for path in sorted({where[prefix + stem + name] for name in names}):
            with open_file(path, onto) as file:
                for name in (n for n in names if where[prefix + stem + n] == path):
                    tensors[name] = file.get_tensor(prefix + stem + name).to(dtype=dtype)
        module.load_state_dict(tensors, strict=True, assign=True)
        return module

    if offload == "none":
        return fill(gemma, "", device)
    empty, gemma.layers = gemma.layers, nn.ModuleList()
    fill(gemma, "", device)
    gemma.layers = stream_blocks(
        len(empty), lambda i, onto: fill(copy.deepcopy(empty[i]), f"layers.{i}.", onto), device, offload
    )
    return gemma


def _find_gemma(folder: Path, expected: dict[str, Tensor]) -> tuple[dict[str, Path], str]:
    """Which file holds which tensor, and the prefix in front of our names; raises ValueError on whatever is wrong."""
    where, rows = {}, {}
    for path in _gemma_files(folder):
        with open_file(path) as file:
            where.update(dict.fromkeys(file.keys(), path))
            rows.update((name, file.get_slice(name)) for name in file.keys())
    prefix = next((p for p in GEMMA_PREFIXES if p + "embed_tokens.weight" in where), None)
    if prefix is None:
        raise ValueError(f"expected '...embed_tokens.weight' in {folder}, got none; is this a Gemma 3 folder?")
    if missing := [name for name in expected if prefix + name not in where]:
        raise ValueError(f"expected {prefix + missing[0]} in {folder}, got {len(missing)} missing; fetch all files")
    for name, like in expected.items():
        row = rows[prefix + name]
        if (want := tuple(like.shape)) != (got := tuple(row.get_shape())):
            raise ValueError(f"expected {prefix + name} of shape {want} in {folder}, got {got}; config.json disagrees")
        if not TYPES.get(row.get_dtype(), torch.uint8).is_floating_point:
            raise ValueError(f"expected floating-point numbers in {prefix + name} of {folder}, got {row.get_dtype()}; use "
                             "the bf16 files")
    return where, prefix


def _gemma_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index lists, else the single one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"expected a 'weight_map' in {index}, got none; download it again")
    if outside := [name for name in listed.values() if Path(name).name != name]:
        raise ValueError(f"expected names of files beside {index}, got {outside[0]!r:.80}; download it again")
    files = [folder / name for name in sorted(set(listed.values()))]
    if absent := [path.name for path in files if not path.is_file()]:
        names = f"{absent[0]} and {len(absent) - 1} more" if len(absent) > 1 else absent[0]
        raise ValueError(f"expected the {len(files)} files of {index}, got no {names}; download the whole Gemma folder")
    return files


def save_gemma(
    folder: str | os.PathLike, gemma: GemmaTextModel, tokenizer: dict, dtype: torch.dtype | None = None
) -> None:
    """Write a text-only Hugging Face folder (config.json, tokenizer.json, model.safetensors) that load_gemma reads.

    tokenizer: the content from train_bpe. dtype: type on disk, None keeps the model's.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(gemma.config.to_dict(), indent=1), encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1), encoding="utf-8")
    tensors = {"model." + n: t.detach().to("cpu", dtype).contiguous() for n, t in gemma.state_dict().items()}
    save_file(tensors, folder / "model.safetensors.part", metadata={"format": "pt"})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")


def _demo() -> None:
    """A small random Gemma: shapes, and as 0/1 grids which word may read which."""
    torch.manual_seed(0)
    config = GemmaConfig(vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16.0, sliding_window=3)
    gemma, ids = GemmaTextModel(config).eval(), torch.tensor([[0, 0, 2, 261, 262, 263, 264, 265]])
    mask = (ids > 0).long()
    with torch.no_grad():
        states = gemma(ids, mask)
        other = gemma(torch.where(mask > 0, ids, 99), mask)
    print(f"ids {tuple(ids.shape)} -> {len(states)} states of {tuple(states[0].shape)}; layers: "
          + " ".join(kind.split("_")[0] for kind in config.layer_types))
    grids = [attention_allowed(mask, window)[0, 0].int().tolist() for window in (config.sliding_window, ids.shape[1])]
    print(f"\nwho (row) may read whom (column), two rows of padding first\n  {'sliding, window 3':20s}full")
    for sliding, full in zip(*grids, strict=True):
        print("  " + "".join(map(str, sliding)).replace("0", ".").ljust(20) + "".join(map(str, full)).replace("0", "."))
    real = mask[0] > 0
    change = max((a - b)[0, real].abs().max().item() for a, b in zip(states, other, strict=True))
    print(f"\nother ids under the padding change real words by {change:.1e}")
    print("Notice: nobody reads a later word, so the first words of two prompts that begin alike have the same states.")


if __name__ == "__main__":
    _demo()
