"""From a prompt to the numbers the video transformer reads: tokenizer, Gemma 3, feature extractor, connector.

The idea. LTX-2.3 does not train a text encoder. It borrows a language model (Gemma 3, frozen), keeps the hidden
state after *every* layer instead of the last one only, mixes them with one linear layer, and lets a small transformer
(the "connector") turn the result into the context that every video block attends to. A prompt has any length but the
context always has N rows: the rows that the prompt leaves free are filled with learned vectors, "registers". Feeding
raw padding instead would make the picture depend on numbers nobody trained, and masking it would waste the rows.

    prompt -Tokenizer-> ids -GemmaTextModel-> hidden states -FeatureExtractor-> features -Connector-> context

paper: ST-DRC, arXiv 2606.02441, overview figure: the Gemma 3 text encoder is frozen; only video blocks are trained.
LTX-2.3: everything else here. Names match the checkpoint, so real weights load unchanged.

Conventions
  ids      int64, BOS (2) in front, no EOS, no chat template, padded on the LEFT with 0 to N
  mask     (B, N), 1 = real token, 0 = padding
  states   tuple of layers + 1 tensors (B, N, Dg), Dg Gemma's width: scaled embeddings first, last one after its norm
  context  (B, N, D), D the width of the video transformer; nothing in it is masked
  The states of padded rows are meaningless (they depend on the attention kernel); nothing here lets them through.
  The null prompt of guidance is the empty string sent through all of this, not a tensor of zeros.

our reading: the tiny stand-in has its own vocabulary, made by `train_bpe` in Gemma's file format, and may set
`text_max_length` in the checkpoint's config (absent in LTX-2.3, meaning 1024).

    encoder = TextEncoder.load("ltx-2.3.safetensors", "gemma-3-12b-it", device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        context = encoder.encode(["A woman laughs in the rain.", ""])         # (2, 1024, 4096)

    python text.py "a person nods in the snow" "a person nods at night"    # draws both with the bundled checkpoint

Read next: vae.py
"""

import copy
import heapq
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoint import (
    MOST_LAYERS,
    TYPES,
    brief,
    check_weights,
    load_weights,
    open_file,
    parse_json,
    read_metadata,
    read_text,
    shapes_from,
)
from memory import stream_blocks
from model import Attention, FeedForward, Linear
from rope import rotary_tables

SPACE = "\u2581"  # Gemma writes a space as this character (a low block), so that a space can be part of a piece
BYTE_PIECES = [f"<0x{value:02X}>" for value in range(256)]
BYTE_OF_PIECE = {piece: bytes([value]) for value, piece in enumerate(BYTE_PIECES)}
SPECIAL_PIECES = ["<pad>", "<eos>", "<bos>", "<unk>"]  # ids 0, 1, 2, 3
DEFAULT_TEXT_LENGTH = 1024  # LTX-2.3: rows of the context, prompt and registers together


# ------------------------------------------------------------ tokenizer


class Tokenizer:
    """Text -> ids with Gemma 3's rules, read from a Hugging Face `tokenizer.json`.

    LTX-2.3: (1) "added" pieces such as `<b>` or line breaks are cut out of the raw text first, leftmost and longest;
    (2) in what is between them every space becomes a low block; (3) byte-pair encoding: start from single characters
    and keep joining the neighbouring pair that stands highest in the list of merges; (4) a character the vocabulary
    does not have becomes its UTF-8 bytes, one piece each, so nothing is ever unknown.

    source: path of a tokenizer.json, or its parsed content. Raises ValueError when there is no such file, when it is
    not JSON, and for a tokenizer of another kind.
    """

    def __init__(self, source: str | os.PathLike | dict):
        data = source if isinstance(source, dict) else _read_json(Path(source))
        _check_tokenizer(data)
        self.vocab: dict[str, int] = dict(data["model"]["vocab"])
        # Gemma's file lists 514,906 merges: rank = place in the list. Old files write "a b", new ones ["a", "b"].
        merges = data["model"]["merges"]
        self.rank = {tuple(m.split(" ")) if isinstance(m, str) else tuple(m): i for i, m in enumerate(merges)}
        added = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
        self.vocab.update(added)
        self.pieces = {index: piece for piece, index in self.vocab.items()}
        self.pad, self.bos = self.vocab["<pad>"], self.vocab["<bos>"]
        longest_first = sorted(added, key=len, reverse=True)  # a regex takes the first alternative that fits
        self._added = re.compile("(" + ("|".join(map(re.escape, longest_first)) or r"\b\B") + ")")  # none: never fits
        # No piece of Gemma's has a space after a letter, so no merge crosses into the next word and words can be
        # encoded one by one. That is exact, and it makes encoding fast; a vocabulary that lacks this is not split.
        crosses = any(SPACE in piece.lstrip(SPACE) for piece in self.vocab if piece not in added)
        self._words = re.compile(".+" if crosses else f"{SPACE}*[^{SPACE}]+|{SPACE}+", re.DOTALL)
        self._seen: dict[str, tuple[int, ...]] = {}  # words encoded before

    def _encode_word(self, word: str) -> tuple[int, ...]:
        """Join the pair that stands highest in the list, the leftmost of equals, until none is listed.

        The pairs wait in a heap: searching all of them for each merge would take minutes for 100,000 characters without
        a space. A joined part leaves "" behind, and `after`, `before` (places of the neighbours) skip it.
        """
        parts: list[str] = []
        for char in word:
            parts += [char] if char in self.vocab else [BYTE_PIECES[b] for b in char.encode("utf-8", "replace")]
        last = len(parts)
        after, before = list(range(1, last + 1)), list(range(-1, last - 1))
        heap = [(self.rank[pair], i, *pair) for i, pair in enumerate(pairwise(parts)) if pair in self.rank]
        heapq.heapify(heap)
        while heap:
            _, i, left, right = heapq.heappop(heap)
            j = after[i]
            if parts[i] != left or j == last or parts[j] != right:
                continue  # one of the two has been joined since
            parts[i], parts[j], after[i] = left + right, "", after[j]
            if after[j] < last:
                before[after[j]] = i
            for a, b in ((before[i], i), (i, after[i])):
                if 0 <= a and b < last and (rank := self.rank.get((parts[a], parts[b]))) is not None:
                    heapq.heappush(heap, (rank, a, parts[a], parts[b]))
        return tuple(self.vocab[part] for part in parts if part)

    def raw_ids(self, text: str) -> list[int]:
        """The ids of exactly this text: nothing stripped, no BOS."""
        ids: list[int] = []
        for i, span in enumerate(self._added.split(text)):  # the odd entries are the added pieces
            if i % 2:
                ids.append(self.vocab[span])
            else:
                for word in self._words.findall(span.replace(" ", SPACE)):
                    if word not in self._seen:
                        self._seen[word] = self._encode_word(word)
                    ids += self._seen[word]
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt. LTX-2.3: surrounding white space stripped, BOS in front, no EOS. "" gives [BOS]."""
        return [self.bos, *self.raw_ids(text.strip())]

    def encode_padded(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        """Ids and mask, both (length,) int64. LTX-2.3: padded on the left; a longer prompt loses its end."""
        if length < 1:
            raise ValueError(f"expected a length of at least 1, got {length}; BOS needs one place")
        ids = self.encode(text)[:length]
        padding = length - len(ids)
        return torch.tensor([self.pad] * padding + ids), torch.tensor([0] * padding + [1] * len(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of these ids, <pad>, <eos> and <bos> left out. Undoes `raw_ids` for text without a literal low block."""
        data = b""
        for index in map(int, ids):
            piece = self.pieces[index]
            if piece not in SPECIAL_PIECES:
                data += BYTE_OF_PIECE.get(piece) or piece.replace(SPACE, " ").encode()
        return data.decode("utf-8", "replace")


def _read_json(path: Path) -> dict:
    """One file of a Gemma folder: a JSON object."""
    if not path.is_file():
        raise ValueError(f"expected {path.name} in {path.parent}, got no such file; download the whole Gemma folder")
    try:
        data = parse_json(read_text(path))
    except (ValueError, OSError) as error:  # broken JSON, or bytes that are no text
        raise ValueError(f"expected JSON in {path}, got {brief(error)}; download it again") from error
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object in {path}, got a {type(data).__name__}; download it again")
    return data


def _check_tokenizer(data: dict) -> None:
    model, normalizer, added = data.get("model") or {}, data.get("normalizer") or {}, data.get("added_tokens") or []
    if not (isinstance(model, dict) and isinstance(normalizer, dict) and isinstance(added, list)):
        raise ValueError("expected objects 'model' and 'normalizer' and a list 'added_tokens', got something else; use "
                         "Gemma 3's tokenizer.json")
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        kind = f"{brief(model['type'])} without it" if "type" in model else "no 'model' of a known type"
        raise ValueError(f"expected BPE with byte_fallback, got {kind}; use Gemma 3's tokenizer.json")
    if absent := {"vocab", "merges"} - set(model):
        raise ValueError(f"expected {min(absent)!r} in the model, got none; use Gemma 3's tokenizer.json")
    _check_pieces(model["vocab"], model["merges"], added)
    if missing := [piece for piece in SPECIAL_PIECES + BYTE_PIECES if piece not in model["vocab"]]:
        raise ValueError(f"expected {missing[0]} in the vocabulary, got none; use Gemma 3's tokenizer.json")
    if normalizer.get("pattern") != {"String": " "} or normalizer.get("content") != SPACE:
        raise ValueError(f"expected ' ' to become '{SPACE}', got normalizer {brief(normalizer, 80)}; use Gemma 3's file")
    for token in added:
        for flag in ("normalized", "lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise ValueError(f"expected added tokens without {flag}, got {token['content']!r:.40} with it; clear it")


def _check_pieces(vocab: object, merges: object, added: list) -> None:
    """Ids are numbers, merges are pairs that make a piece of the vocabulary: nothing fails in the middle of a prompt."""
    advice = "use Gemma 3's tokenizer.json"
    if not (isinstance(vocab, dict) and isinstance(merges, list)):
        raise ValueError(f"expected an object 'vocab' and a list 'merges', got something else; {advice}")
    for token in added:
        if not (isinstance(token, dict) and isinstance(token.get("content"), str) and token["content"] and "id" in token):
            raise ValueError(f"expected added tokens with a content and an id, got {token!r:.40}; {advice}")
    for index in (*vocab.values(), *(token["id"] for token in added)):
        if type(index) is not int or not 0 <= index < 2**31:
            raise ValueError(f"expected ids 0, 1, 2, ... in the vocabulary, got {index!r:.40}; {advice}")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)):
            raise ValueError(f"expected merges of two pieces, got {merge!r:.40}; {advice}")
        if pair[0] + pair[1] not in vocab:
            raise ValueError(f"expected {pair[0] + pair[1]!r:.40} of a merge in the vocabulary, got none; {advice}")


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict:
    """A small vocabulary for `texts`, as the content of a Gemma-style tokenizer.json (write it with json.dump).

    our reading: the bundled tiny model gets its own vocabulary, because Gemma's embedding table alone is a billion
    numbers. Ids: <pad> <eos> <bos> <unk>, 256 byte pieces, the characters of `texts` sorted, then one piece per merge.
    Byte-pair training: join the most frequent neighbouring pair (ties: alphabetically first), again and again; never
    across words. Gives fewer than vocab_size pieces when no pair occurs twice any more.
    Raises ValueError when vocab_size is too small for bytes and characters.
    """
    words = Counter(w for t in texts for w in re.findall(f"{SPACE}*[^{SPACE}]+", t.strip().replace(" ", SPACE)))
    pieces = SPECIAL_PIECES + BYTE_PIECES + sorted({SPACE}.union(*words))
    if vocab_size < len(pieces):
        raise ValueError(f"expected vocab_size >= {len(pieces)} (bytes and characters), got {vocab_size}; raise it")
    vocab = {piece: index for index, piece in enumerate(pieces)}
    split = {word: list(word) for word in words}
    merges: list[list[str]] = []
    while len(vocab) < vocab_size:
        pairs: Counter = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        pair = min(pairs, key=lambda p: (-pairs[p], p), default=None)
        if pair is None or pairs[pair] < 2:
            break
        merges.append(list(pair))
        vocab.setdefault(pair[0] + pair[1], len(vocab))
        for parts in split.values():
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == pair:
                    parts[i : i + 2] = [pair[0] + pair[1]]
                i += 1
    return _tokenizer_json(vocab, merges)


def _tokenizer_json(vocab: dict[str, int], merges: list[list[str]]) -> dict:
    off = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    first = {"Sequence": {"id": "A", "type_id": 0}}
    second = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": p, **off, "special": True} for i, p in enumerate(SPECIAL_PIECES)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        # As in Gemma's file. It never cuts anything: the normalizer has already replaced every space.
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious",
                          "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [vocab["<bos>"]], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocab, "merges": merges,
        },
    }  # fmt: skip


# ------------------------------------------------------------ Gemma 3


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
        data = _read_json(path)
        try:
            return cls.from_dict(data)
        except (TypeError, AttributeError, ArithmeticError) as error:  # a list where an object belongs, and so on
            raise ValueError(f"expected the settings of a Gemma 3 in {path}, got {brief(error)}; fetch it again") from error

    @classmethod
    def from_dict(cls, config: dict) -> "GemmaConfig":
        """From the content of config.json: multimodal or text-only, with old or new names for the rotary settings.

        Raises ValueError for another family of models, and for settings that no released Gemma 3 uses (attention bias,
        score soft-capping, ...).
        """
        config = config.get("text_config", config)
        if (kind := config.get("model_type", "gemma3_text")) not in ("gemma3", "gemma3_text"):
            raise ValueError(f"expected model_type gemma3 or gemma3_text, got {brief(kind, 40)}; use a Gemma 3 folder")
        wanted = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attn_logit_softcapping": None,
                  "use_bidirectional_attention": False}  # fmt: skip
        for key, value in wanted.items():
            if (config.get(key) or value) != value:
                raise ValueError(f"expected {key} = {value}, got {brief(config[key], 40)}; use a Gemma 3 text model")
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
                raise ValueError(f"expected linear rotary scaling on full layers only, got {brief(kind, 40)}; use Gemma 3")
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
        self.q_proj = Linear(width, config.num_attention_heads * hd, bias=False)
        self.k_proj = Linear(width, config.num_key_value_heads * hd, bias=False)
        self.v_proj = Linear(width, config.num_key_value_heads * hd, bias=False)
        self.o_proj = Linear(config.num_attention_heads * hd, width, bias=False)
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
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

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
    listed = _read_json(index).get("weight_map")
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


# ------------------------------------------------------------ to the video model's width


class FeatureExtractor(nn.Module):
    """All hidden states of a token -> one vector of the video model's width. Checkpoint prefix EXTRACTOR_PREFIX.

    config: config["transformer"] of the checkpoint; gemma_hidden: Dg; num_states: Gemma's layers + 1.
    """

    def __init__(self, config: dict, gemma_hidden: int, num_states: int):
        super().__init__()
        _check_connector(config)
        dim = config["connector_num_attention_heads"] * config["connector_attention_head_dim"]
        self.scale = (dim / gemma_hidden) ** 0.5
        self.video_aggregate_embed = Linear(gemma_hidden * num_states, dim)

    def normalised(self, states: Sequence[Tensor], mask: Tensor) -> Tensor:
        """LTX-2.3: every state of every token to mean square 1, then flattened feature slow, state fast; padding zero.

        states: num_states x (B, N, Dg), mask (B, N) -> (B, N, Dg * num_states).
        """
        # Layers differ in scale by orders of magnitude; without this step the loudest one would be all that is heard.
        stack = torch.stack([F.rms_norm(s, (s.shape[-1],), eps=1e-6) for s in states], dim=-1)  # (B, N, Dg, states)
        flat = stack.flatten(2)  # (B, N, Dg * states): element j * states + l is feature j of state l
        return torch.where(mask[..., None] > 0, flat, torch.zeros_like(flat))

    def forward(self, states: Sequence[Tensor], mask: Tensor) -> Tensor:
        """states: num_states x (B, N, Dg), mask (B, N) -> features (B, N, D)."""
        features = self.normalised(states, mask) * self.scale  # (B, N, Dg * states)
        return self.video_aggregate_embed(features.to(self.video_aggregate_embed.weight.dtype))  # (B, N, D)


class ConnectorBlock(nn.Module):
    """Pre-norm self-attention and feed-forward; the norms have no weights."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn1 = Attention(dim, heads)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn1(F.rms_norm(x, (x.shape[-1],), eps=1e-6), rotary=rotary)  # (B, N, D)
        return x + self.ff(F.rms_norm(x, (x.shape[-1],), eps=1e-6))  # (B, N, D)


class Connector(nn.Module):
    """Features -> context: prompt tokens first, registers after, then a few blocks. Checkpoint prefix CONNECTOR_PREFIX.

    config: config["transformer"] of the checkpoint.
    """

    def __init__(self, config: dict):
        super().__init__()
        _check_connector(config)
        self.heads = config["connector_num_attention_heads"]
        dim = self.heads * config["connector_attention_head_dim"]
        self.theta = config.get("positional_embedding_theta", 10000.0)
        self.max_pos = tuple(config.get("connector_positional_embedding_max_pos", [4096]))
        self.learnable_registers = nn.Parameter(torch.rand(config["connector_num_learnable_registers"], dim) * 2 - 1)
        self.transformer_1d_blocks = nn.ModuleList(
            ConnectorBlock(dim, self.heads) for _ in range(config["connector_num_layers"])
        )

    def fill(self, features: Tensor, mask: Tensor) -> Tensor:
        """LTX-2.3: valid tokens move to the front in their order; every place p behind them takes register p mod count.

        features (B, N, D), mask (B, N) -> (B, N, D). Raises ValueError when N is no multiple of the register count.
        """
        B, N, D = features.shape
        registers = self.learnable_registers.to(features.dtype)
        if N % len(registers):
            raise ValueError(f"expected a text length divisible by {len(registers)} registers, got {N}; pad more")
        valid = (mask > 0).long()  # (B, N)
        order = valid.argsort(dim=1, descending=True, stable=True)  # stable: the words keep their order
        moved = features.gather(1, order[..., None].expand(B, N, D))  # (B, N, D)
        # Counted by place, not from the end of the prompt: which registers are used depends on the prompt's length.
        is_prompt = torch.arange(N, device=mask.device) < valid.sum(1, keepdim=True)  # (B, N)
        return torch.where(is_prompt[..., None], moved, registers.repeat(N // len(registers), 1))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """features (B, N, D), mask (B, N) -> context (B, N, D), every row of which may be attended to."""
        x = self.fill(features, mask)  # (B, N, D)
        places = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)[None, None]  # (1, 1, N): one axis
        rotary = rotary_tables(places, x.shape[-1], self.heads, self.theta, self.max_pos)  # each (1, nh, N, hd/2)
        for block in self.transformer_1d_blocks:
            x = block(x, rotary)  # (B, N, D)
        return F.rms_norm(x, (x.shape[-1],), eps=1e-6)  # (B, N, D)


def _check_connector(config: dict) -> None:
    wanted = {"connector_apply_gated_attention": True, "connector_norm_output": True, "rope_type": "split",
              "caption_proj_before_connector": True, "text_encoder_norm_type": "per_token_rms"}  # fmt: skip
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"expected {key} = {value} as in LTX-2.3, got {config[key]}; use an LTX-2.3 checkpoint")


# ------------------------------------------------------------ everything together

EXTRACTOR_PREFIX = "text_embedding_projection."
CONNECTOR_PREFIX = "model.diffusion_model.video_embeddings_connector."


def check_text(
    checkpoint: str | os.PathLike, gemma_root: str | os.PathLike
) -> tuple[FeatureExtractor, Connector, GemmaConfig, int]:
    """Whether a checkpoint and a Gemma folder fit together, from headers alone: both parts as shapes, Gemma's, and N.

    Raises ValueError where they do not.
    """
    config = read_metadata(checkpoint)["config"].get("transformer") or {}
    sizes = GemmaConfig.from_folder(gemma_root)
    with shapes_from(checkpoint):
        extractor = FeatureExtractor(config, sizes.hidden_size, sizes.num_hidden_layers + 1)
        connector = Connector(config)
    try:
        check_weights(extractor, checkpoint, EXTRACTOR_PREFIX)
    except ValueError as error:  # its width is Gemma's: the usual cause is another size of Gemma
        which = f"{gemma_root} has {sizes.num_hidden_layers} layers of {sizes.hidden_size}"
        hint = f", or the Gemma it was trained with: {which}" if "of shape" in str(error) else ""
        raise ValueError(f"{error}{hint}") from error
    check_weights(connector, checkpoint, CONNECTOR_PREFIX)
    length, registers = config.get("text_max_length", DEFAULT_TEXT_LENGTH), len(connector.learnable_registers)
    if not registers or not length or length % registers:
        raise ValueError(f"expected text_max_length, a multiple of the {registers} registers, in the config of "
                         f"{checkpoint}, got {length}; use a checkpoint whose config fits its tensors")
    return extractor, connector, sizes, length


def load_tokenizer(gemma_root: str | os.PathLike, sizes: GemmaConfig) -> Tokenizer:
    """The folder's tokenizer; raises ValueError when it knows ids that the folder's model does not."""
    tokenizer = Tokenizer(Path(gemma_root) / "tokenizer.json")
    if (last := max(tokenizer.pieces)) >= sizes.vocab_size:
        raise ValueError(f"expected ids below {sizes.vocab_size} (vocab_size of config.json), got {last} in "
                         f"{gemma_root}/tokenizer.json; take both from one folder")
    return tokenizer


@torch.no_grad()
def encode_once(
    prompts: Sequence[str],
    checkpoint: str | os.PathLike,
    gemma_root: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    offload: str = "none",
) -> tuple[Tensor, list[int]]:
    """What TextEncoder.load(...).encode(prompts) gives, each part freed before the next one is loaded.

    For LTX-2.3 that is 25 GB at a time instead of 32. Returns context (B, N, D) and the tokens of each prompt, of which
    at most N are read. Raises ValueError where a file does not fit.
    """
    extractor, connector, sizes, length = check_text(checkpoint, gemma_root)
    tokenizer = load_tokenizer(gemma_root, sizes)
    padded = zip(*(tokenizer.encode_padded(prompt, length) for prompt in prompts), strict=True)
    ids, mask = (torch.stack(rows).to(device) for rows in padded)  # (B, N) each
    states = load_gemma(gemma_root, dtype, device, offload)(ids, mask)  # nobody holds Gemma after this line
    features = load_weights(extractor, checkpoint, EXTRACTOR_PREFIX, dtype, device)(states, mask)
    del states, extractor
    context = load_weights(connector, checkpoint, CONNECTOR_PREFIX, dtype, device)(features, mask)
    return context, [len(tokenizer.encode(prompt)) for prompt in prompts]


class TextEncoder(nn.Module):
    """Tokenizer, Gemma, extractor and connector in one. Keeps gradients unless called under torch.no_grad().

    length: N, rows of the context; a multiple of the number of registers.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        gemma: GemmaTextModel,
        extractor: FeatureExtractor,
        connector: Connector,
        length: int = DEFAULT_TEXT_LENGTH,
    ):
        super().__init__()
        self.tokenizer, self.length = tokenizer, length
        self.gemma, self.extractor, self.connector = gemma, extractor, connector

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike,
        gemma_root: str | os.PathLike,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        offload: str = "none",
    ) -> "TextEncoder":
        """From an LTX-2.3 checkpoint (extractor, connector) and a Gemma 3 folder (tokenizer, text model).

        dtype None keeps what is stored. offload: how Gemma's layers come, see load_gemma. Everything is checked before
        the first large read. Raises ValueError where a file does not fit.
        """
        extractor, connector, sizes, length = check_text(checkpoint, gemma_root)
        tokenizer = load_tokenizer(gemma_root, sizes)
        gemma = load_gemma(gemma_root, dtype, device, offload)
        load_weights(extractor, checkpoint, EXTRACTOR_PREFIX, dtype, device)
        load_weights(connector, checkpoint, CONNECTOR_PREFIX, dtype, device)
        return cls(tokenizer, gemma, extractor, connector, length)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids and mask, both (B, N), on the model's device."""
        if type(prompts) is str:  # would otherwise be read as one prompt per character
            raise ValueError("expected a list of prompts, got one string; write [prompt]")
        device = self.connector.learnable_registers.device
        ids, masks = zip(*(self.tokenizer.encode_padded(p, self.length) for p in prompts), strict=True)
        return torch.stack(ids).to(device), torch.stack(masks).to(device)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, N) -> context (B, N, D). For training, where tokenizing is done beforehand."""
        return self.connector(self.extractor(self.gemma(ids, mask), mask), mask)  # (B, N, D)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> context (B, N, D). "" is the null prompt of guidance."""
        return self(*self.tokenize(prompts))


# ------------------------------------------------------------ demo

TINY = Path(__file__).parent / "weights" / "tiny"
PROMPT, OTHER = (f"a person in a {color} shirt grins in a café, in daylight" for color in ("red", "blue"))
COLUMNS, CELL, MARGIN = 16, 90, 30  # of the picture's grids; pixels
INK, GREY, PADDING = (40, 40, 40), (110, 110, 110), (240, 240, 240)
KINDS = {"special": (205, 205, 205), "piece": (158, 202, 235), "single character": (176, 222, 176),
         "byte of a character that the vocabulary lacks": (250, 200, 120), "register": (222, 208, 240)}  # fmt: skip


def kind_of(piece: str) -> str:
    """Which of KINDS a piece of the vocabulary is."""
    if piece in SPECIAL_PIECES:
        return "special"
    if piece in BYTE_OF_PIECE:
        return "byte of a character that the vocabulary lacks"
    return "piece" if len(piece) > 1 else "single character"


@torch.no_grad()
def row_sources(connector: Connector, features: Tensor, mask: Tensor) -> Tensor:
    """What `connector.fill` puts into each row, found by comparing numbers: (B, N) int64.

    features (B, N, D), mask (B, N). p >= 0 is the token at place p of `features`, -1 - r is register r.
    """
    filled, N = connector.fill(features, mask), mask.shape[1]
    tokens = (filled[:, :, None] == features[:, None]).all(-1) & (mask[:, None] > 0)  # (B, N, N)
    registers = (filled[:, :, None] == connector.learnable_registers.to(filled.dtype)).all(-1)  # (B, N, registers)
    first = torch.cat([tokens, registers], dim=-1).long().argmax(-1)  # (B, N)
    return torch.where(first < N, first, N - 1 - first)


@torch.no_grad()
def row_changes(encoder: TextEncoder, prompt: str, other: str) -> tuple[Tensor, Tensor]:
    """How far each row of the features and of the context is from that of another prompt: root mean square, (N,) each.

    Both prompts' features are compared as the connector gets them, prompt first.
    """
    ids, mask = encoder.tokenize([prompt, other])
    features = encoder.extractor(encoder.gemma(ids, mask), mask)  # (2, N, D)
    filled, context = encoder.connector.fill(features, mask), encoder.connector(features, mask)
    return tuple((x[0] - x[1]).float().square().mean(-1).sqrt() for x in (filled, context))


def draw(encoder: TextEncoder, prompt: str, other: str) -> Image.Image:
    """Pieces of a prompt, the rows that Gemma and the connector read, and what another prompt changes in the context.

    For an encoder of few rows (48 in the tiny one). Low blocks are drawn as "_".
    """
    tokenizer, shown = encoder.tokenizer, [prompt, ""]
    ids, mask = encoder.tokenize(shown)  # (2, N)
    with torch.no_grad():
        sources = row_sources(encoder.connector, encoder.extractor(encoder.gemma(ids, mask), mask), mask)  # (2, N)
    pieces = [[tokenizer.pieces[i] for i in row] for row in ids.tolist()]
    N, count = encoder.length, len(encoder.connector.learnable_registers)
    lines = -(-N // COLUMNS)  # rounded up
    picture = Image.new("RGB", (2 * MARGIN + COLUMNS * CELL, 4 * (lines * 32 + 52) + 60 * (2 + N // 9)), "white")
    y = _draw_pieces(picture, tokenizer, ids[0][mask[0] > 0].tolist())

    read = [("<pad>", PADDING) if not real else (piece, KINDS[kind_of(piece)])
            for piece, real in zip(pieces[0], mask[0].tolist(), strict=True)]  # fmt: skip
    y = _draw_rows(picture, y, f"2. What Gemma reads: {N} places, padding on the left", read)
    titles = (f"3. What the connector reads: the prompt first; behind it place p takes register p mod {count}",
              "4. The same for the empty prompt of guidance: one piece and registers, nothing is zero")  # fmt: skip
    for title, row, source in zip(titles, pieces, sources.tolist(), strict=True):
        cells = [(row[p], KINDS[kind_of(row[p])]) if p >= 0 else (f"r{-1 - p}", KINDS["register"]) for p in source]
        y = _draw_rows(picture, y, title, cells)
    change = row_changes(encoder, prompt, other)[1].tolist()
    cells = [(f"{value:.2f}", heat(value)) for value in change]
    what = _difference(tokenizer, prompt, other)
    title = f"5. How far each row of the context moves {what} (0: not at all; size of a row: 1)"
    y = _draw_rows(picture, y, title, cells)
    return picture.crop((0, 0, picture.width, y))


def _difference(tokenizer: Tokenizer, prompt: str, other: str) -> str:
    ours, theirs = tokenizer.encode(prompt), tokenizer.encode(other)
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a != b]
    if len(ours) != len(theirs) or len(pairs) != 1:
        return "for the other prompt"
    return "when {} becomes {}".format(*(tokenizer.pieces[i] for i in pairs[0]))


def heat(value: float) -> tuple[int, int, int]:
    """White at 0, red from 1 on, by the square root, so that small changes are seen."""
    share = min(max(value, 0.0), 1.0) ** 0.5
    return 255, round(255 - 165 * share), round(255 - 190 * share)


def _write(picture: Image.Image, place: tuple, words: str, size: int, color: tuple = INK, anchor: str = "mm") -> float:
    """Write words and return their width. Pillow's own font has no low block and few accents: "_" and escapes."""
    font = ImageFont.load_default(size=size)
    words = words.replace(SPACE, "_").encode("ascii", "backslashreplace").decode()
    ImageDraw.Draw(picture).text(place, words, color, font, anchor)
    return font.getlength(words)


def _draw_pieces(picture: Image.Image, tokenizer: Tokenizer, ids: list[int]) -> int:
    """Boxes with ids, in lines; returns where the next part begins."""
    title = f"1. The prompt as {len(ids)} pieces of the {len(tokenizer.vocab)} in the vocabulary, with their ids"
    _write(picture, (MARGIN, 30), title, 20, anchor="lm")
    x, y, paper = MARGIN, 52, ImageDraw.Draw(picture)
    for i in ids:
        piece = tokenizer.pieces[i]
        width = max(round(ImageFont.load_default(size=18).getlength(piece)) + 20, 42)
        if x + width > picture.width - MARGIN:
            x, y = MARGIN, y + 60
        paper.rectangle((x, y, x + width - 4, y + 52), KINDS[kind_of(piece)])
        _write(picture, (x + width // 2 - 2, y + 18), piece, 18)
        _write(picture, (x + width // 2 - 2, y + 41), str(i), 14, GREY)
        x += width
    x, y = MARGIN, y + 74
    for name, color in KINDS.items():
        paper.rectangle((x, y - 7, x + 14, y + 7), color)
        x += 40 + round(_write(picture, (x + 22, y), name, 15, GREY, anchor="lm"))
    _write(picture, (x, y), "_ a space", 15, GREY, anchor="lm")
    return y + 20


def _draw_rows(picture: Image.Image, y: int, title: str, cells: list[tuple[str, tuple]]) -> int:
    """A grid of COLUMNS cells (words, colour), place 0 first; returns where the next part begins."""
    _write(picture, (MARGIN, y + 24), title, 20, anchor="lm")
    for p, (words, color) in enumerate(cells):
        left, top = MARGIN + p % COLUMNS * CELL, y + 42 + p // COLUMNS * 32
        ImageDraw.Draw(picture).rectangle((left, top, left + CELL - 3, top + 29), color)
        _write(picture, (left + CELL // 2 - 1, top + 15), words[:11], 15, GREY if words == "<pad>" else INK)
    return y + 42 + -(-len(cells) // COLUMNS) * 32 + 14


def _demo(prompt: str = PROMPT, other: str = OTHER) -> None:
    """A prompt's road through the bundled checkpoint in numbers, and text_demo.png. Raises ValueError without it."""
    encoder = TextEncoder.load(TINY / "model.safetensors", TINY / "gemma", dtype=torch.float32)
    tokenizer, N = encoder.tokenizer, encoder.length
    ids = tokenizer.encode(prompt)
    print(f"vocabulary {len(tokenizer.vocab)} pieces, {len(tokenizer.rank)} merges (Gemma 3: 514,906 merges)")
    print(f"prompt     {prompt!r}\npieces     {' '.join(tokenizer.pieces[i] for i in ids)}\nids        {ids}")
    print(f"back       {tokenizer.decode(ids)!r}\n")
    with torch.no_grad():
        ids, mask = encoder.tokenize([prompt, ""])
        states = encoder.gemma(ids, mask)
        features = encoder.extractor(states, mask)
        context = encoder.connector(features, mask)
        noise = torch.where(mask > 0, ids, torch.full_like(ids, 55))
        padded = (encoder(noise, mask) - context).abs().max()
    print(f"ids, mask  {tuple(ids.shape)}: this prompt and the empty one, {mask.sum(1).tolist()} real tokens")
    print(f"states     {len(states)} x {tuple(states[0].shape)}: embeddings and every layer of Gemma")
    print(f"features   {tuple(features.shape)}: one linear layer over all of them")
    print(f"context    {tuple(context.shape)}: every row is read by the video transformer")
    for row in row_sources(encoder.connector, features, mask).tolist():
        print("rows       " + " ".join("p" if p >= 0 else str(-1 - p) for p in row) + "  (p token, number register)")
    before, after = row_changes(encoder, prompt, other)
    tokens = int(mask[0].sum())
    print(f"\nother ids under the padding change the context by at most {padded:.1e}")
    print(f"other prompt {other!r}:")
    print(f"  rows that differ when the connector reads them {int((before > 1e-4).sum())} of {N}, "
          f"in the context {int((after > 1e-4).sum())} of {N}")
    if tokens < N:
        print(f"  mean change of the {tokens} prompt rows {after[:tokens].mean():.2f}, "
              f"of the {N - tokens} register rows {after[tokens:].mean():.2f}")
    draw(encoder, prompt, other).save("text_demo.png")
    print("wrote text_demo.png: pieces and ids; the rows of Gemma, of the connector, of the empty prompt; what changes")
    print("Notice: the empty prompt fills every row too; an unknown letter becomes bytes; another word moves every row "
          "of the context, for the connector looks everywhere, while Gemma looks only back.")


if __name__ == "__main__":
    try:
        _demo(*sys.argv[1:3])
    except ValueError as error:
        print(f"text.py: error: {error}", file=sys.stderr)
        sys.exit(2)
