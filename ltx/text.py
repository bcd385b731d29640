"""From a prompt to the numbers the video transformer reads: Gemma's states, feature extractor, connector.

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

our reading: the tiny stand-in may set `text_max_length` in the checkpoint's config (absent in LTX-2.3, meaning 1024).

    encoder = TextEncoder.load("ltx-2.3.safetensors", "gemma-3-12b-it", device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        context = encoder.encode(["A woman laughs in the rain.", ""])         # (2, 1024, 4096)

    python -m ltx.text "a person nods in the snow" "a person nods at night"    # draws both with the bundled checkpoint

Read next: lora.py
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from ltx.checkpoint import check_weights, load_weights, read_metadata, shapes_from
from ltx.gemma import GemmaConfig, GemmaTextModel, load_gemma
from ltx.tokenizer import BYTE_OF_PIECE, SPACE, SPECIAL_PIECES, Tokenizer
from model import Attention, FeedForward
from rope import rotary_tables

DEFAULT_TEXT_LENGTH = 1024  # LTX-2.3: rows of the context, prompt and registers together


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
        self.video_aggregate_embed = nn.Linear(gemma_hidden * num_states, dim)

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

TINY = Path(__file__).resolve().parents[1] / "weights" / "tiny"
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
