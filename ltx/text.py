"""From a prompt to what the video transformer reads: Gemma's states, feature extractor, connector.

The idea. LTX-2.3 does not train a text encoder. It borrows a language model (Gemma 3, frozen),
keeps the hidden state after *every* layer, mixes them with one linear layer, and lets a small
transformer (the "connector") turn the result into the context that every video block attends to.
A prompt has any length but the context always has N rows: those that the prompt leaves free are
filled with learned vectors, "registers". Feeding raw padding instead would make the picture depend
on numbers that nobody trained, and masking it would waste the rows.

    prompt -Tokenizer-> ids -Gemma-> states -FeatureExtractor-> features -Connector-> context

paper: ST-DRC, arXiv 2606.02441, overview figure: the Gemma 3 text encoder is frozen.
LTX-2.3: everything else. Names match the checkpoint, so real weights load unchanged.
our reading: the tiny stand-in sets `text_max_length` in its config (absent in LTX-2.3: 1024).

Conventions. ids and mask (B, N) as in tokenizer.py, states as in gemma.py; context (B, N, D), D
the width of the video transformer, every row valid. The null prompt of guidance is the empty string
sent through all of this, not a tensor of zeros.

    encoder = TextEncoder.load("ltx-2.3.safetensors", "gemma-3-12b-it", "cuda", torch.bfloat16)
    with torch.no_grad():
        context = encoder.encode(["A woman laughs in the rain.", ""])      # (2, 1024, 4096)

    python -m ltx.text "a person nods in the snow" "a person nods at night"

Read next: ltx/lora.py
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.cli import command
from ltx.checkpoint import check_weights, load_weights, read_metadata, shapes_from
from ltx.gemma import GemmaConfig, GemmaTextModel, load_gemma
from ltx.tokenizer import Tokenizer
from model import Attention, FeedForward
from rope import rotary_tables

DEFAULT_TEXT_LENGTH = 1024  # LTX-2.3: rows of the context, prompt and registers together
EXTRACTOR_PREFIX = "text_embedding_projection."  # of the names in the checkpoint
CONNECTOR_PREFIX = "model.diffusion_model.video_embeddings_connector."


class FeatureExtractor(nn.Module):
    """All hidden states of a token -> one vector of the video model's width.

    config: config["transformer"] of the checkpoint; gemma_hidden: Dg; num_states: layers + 1.
    """

    def __init__(self, config: dict, gemma_hidden: int, num_states: int):
        super().__init__()
        _check_connector(config)
        dim = config["connector_num_attention_heads"] * config["connector_attention_head_dim"]
        self.scale = (dim / gemma_hidden) ** 0.5
        self.video_aggregate_embed = nn.Linear(gemma_hidden * num_states, dim)

    def normalised(self, states: Sequence[Tensor], mask: Tensor) -> Tensor:
        """LTX-2.3: each state of each token to mean square 1, all of them in a row; padding zero.

        states: num_states x (B, N, Dg), mask (B, N) -> (B, N, Dg * num_states).
        """
        # Layers differ in scale by orders of magnitude: without this only the loudest is heard.
        # Element j * num_states + l is feature j of state l. No name for the normalised states:
        # they would outlive the stack, two gigabytes of LTX-2.3's.
        flat = torch.stack(tuple(F.rms_norm(state, (state.shape[-1],), eps=1e-6)
                                 for state in states), dim=-1).flatten(2)  # (B, N, Dg * states)
        return torch.where(mask[..., None] > 0, flat, torch.zeros_like(flat))

    def forward(self, states: Sequence[Tensor], mask: Tensor) -> Tensor:
        """states: num_states x (B, N, Dg), mask (B, N) -> features (B, N, D)."""
        flat = self.normalised(states, mask) * self.scale        # (B, N, Dg * states)
        flat = flat.to(self.video_aggregate_embed.weight.dtype)
        return self.video_aggregate_embed(flat)                  # (B, N, D)


class ConnectorBlock(nn.Module):
    """Pre-norm self-attention and feed-forward; the norms have no weights."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attn1 = Attention(dim, heads)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn1(F.rms_norm(x, (x.shape[-1],), eps=1e-6), rotary=rotary)  # (B, N, D)
        return x + self.ff(F.rms_norm(x, (x.shape[-1],), eps=1e-6))                 # (B, N, D)


class Connector(nn.Module):
    """Features -> context: prompt tokens first, registers after, then a few blocks.

    config: config["transformer"] of the checkpoint.
    """

    def __init__(self, config: dict):
        super().__init__()
        _check_connector(config)
        self.heads = config["connector_num_attention_heads"]
        dim = self.heads * config["connector_attention_head_dim"]
        self.theta = config.get("positional_embedding_theta", 10000.0)
        self.max_pos = tuple(config.get("connector_positional_embedding_max_pos", [4096]))
        registers = config["connector_num_learnable_registers"]
        self.learnable_registers = nn.Parameter(torch.rand(registers, dim) * 2 - 1)
        blocks = (ConnectorBlock(dim, self.heads) for _ in range(config["connector_num_layers"]))
        self.transformer_1d_blocks = nn.ModuleList(blocks)

    def fill(self, features: Tensor, mask: Tensor) -> Tensor:
        """LTX-2.3: real tokens move to the front; place p behind them takes register p mod count.

        features (B, N, D), mask (B, N) -> (B, N, D). Raises ValueError when N is no multiple of the
        number of registers.
        """
        B, N, D = features.shape
        registers = self.learnable_registers.to(features.dtype)  # (count, D)
        count = len(registers)
        if N % count:
            raise ValueError(f"expected a text length divisible by {count} registers, got {N}; "
                             "pad more")
        real = (mask > 0).long()                                      # (B, N)
        order = real.argsort(dim=1, descending=True, stable=True)     # words keep their order
        moved = features.gather(1, order[..., None].expand(B, N, D))  # (B, N, D)
        is_prompt = torch.arange(N, device=mask.device) < real.sum(1, keepdim=True)
        # By place, not from the prompt's end: its length decides which registers are left out.
        return torch.where(is_prompt[..., None], moved, registers.repeat(N // count, 1))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """features (B, N, D), mask (B, N) -> context (B, N, D); every row may be attended to."""
        x = self.fill(features, mask)  # (B, N, D)
        place = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)  # (N,)
        # One axis; the two tables are (1, nh, N, hd/2).
        rotary = rotary_tables(place[None, None], x.shape[-1], self.heads, self.theta, self.max_pos)
        for block in self.transformer_1d_blocks:
            x = block(x, rotary)  # (B, N, D)
        return F.rms_norm(x, (x.shape[-1],), eps=1e-6)  # (B, N, D)


def _check_connector(config: dict) -> None:
    wanted = {"connector_apply_gated_attention": True, "connector_norm_output": True,
              "caption_proj_before_connector": True, "rope_type": "split",
              "text_encoder_norm_type": "per_token_rms"}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise ValueError(f"expected {key} = {value} as in LTX-2.3, got {config[key]}; "
                             "use an LTX-2.3 checkpoint")


def check_text(checkpoint: str | os.PathLike, gemma_root: str | os.PathLike
               ) -> tuple[FeatureExtractor, Connector, GemmaConfig, int]:
    """Whether a checkpoint and a Gemma folder fit, from headers alone. Raises ValueError.

    Returns extractor and connector without memory (on the meta device), Gemma's sizes, and N.
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
    length = config.get("text_max_length", DEFAULT_TEXT_LENGTH)
    registers = len(connector.learnable_registers)
    if length % registers:
        raise ValueError(f"expected text_max_length, a multiple of the {registers} registers, in "
                         f"the config of {checkpoint}, got {length}; use a checkpoint whose config "
                         "fits its tensors")
    return extractor, connector, sizes, length


def load_tokenizer(gemma_root: str | os.PathLike, sizes: GemmaConfig) -> Tokenizer:
    """The folder's tokenizer. Raises ValueError when its model does not have all of the ids."""
    tokenizer = Tokenizer(Path(gemma_root) / "tokenizer.json")
    if (last := max(tokenizer.pieces)) >= sizes.vocab_size:
        raise ValueError(f"expected ids below {sizes.vocab_size} (vocab_size of config.json), "
                         f"got {last} in {gemma_root}/tokenizer.json; take both from one folder")
    return tokenizer


@torch.no_grad()
def encode_once(prompts: Sequence[str], checkpoint: str | os.PathLike,
                gemma_root: str | os.PathLike, device: str | torch.device = "cpu",
                dtype: torch.dtype | None = None, offload: str = "none"
                ) -> tuple[Tensor, list[int]]:
    """TextEncoder.load(...).encode(prompts), each part freed before the next: 25 GB, and not 32.

    Returns context (B, N, D) and how many tokens each prompt has, of which at most N are read.
    Raises ValueError where a file does not fit.
    """
    extractor, connector, sizes, length = check_text(checkpoint, gemma_root)
    tokenizer = load_tokenizer(gemma_root, sizes)
    padded = zip(*(tokenizer.encode_padded(prompt, length) for prompt in prompts), strict=True)
    ids, mask = (torch.stack(rows).to(device) for rows in padded)  # (B, N) each
    states = load_gemma(gemma_root, dtype, device, offload)(ids, mask)  # and Gemma is free again
    features = load_weights(extractor, checkpoint, EXTRACTOR_PREFIX, dtype, device)(states, mask)
    del states, extractor
    context = load_weights(connector, checkpoint, CONNECTOR_PREFIX, dtype, device)(features, mask)
    return context, [len(tokenizer.encode(prompt)) for prompt in prompts]


class TextEncoder(nn.Module):
    """Tokenizer, Gemma, extractor and connector in one. Under torch.no_grad() unless it is trained.

    length: N, rows of the context; a multiple of the number of registers.
    """

    def __init__(self, tokenizer: Tokenizer, gemma: GemmaTextModel, extractor: FeatureExtractor,
                 connector: Connector, length: int = DEFAULT_TEXT_LENGTH):
        super().__init__()
        self.tokenizer, self.length = tokenizer, length
        self.gemma, self.extractor, self.connector = gemma, extractor, connector

    @classmethod
    def load(cls, checkpoint: str | os.PathLike, gemma_root: str | os.PathLike,
             device: str | torch.device = "cpu", dtype: torch.dtype | None = None,
             offload: str = "none") -> "TextEncoder":
        """From an LTX-2.3 checkpoint (extractor, connector) and a Gemma 3 folder (the rest).

        dtype None keeps what is stored. offload: how Gemma's layers come, see load_gemma.
        Everything is checked before the first large read. Raises ValueError.
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
        padded = (self.tokenizer.encode_padded(prompt, self.length) for prompt in prompts)
        ids, masks = zip(*padded, strict=True)
        return torch.stack(ids).to(device), torch.stack(masks).to(device)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, N) -> context (B, N, D). For training, where tokenizing is done before."""
        return self.connector(self.extractor(self.gemma(ids, mask), mask), mask)  # (B, N, D)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> context (B, N, D). "" is the null prompt of guidance."""
        return self(*self.tokenize(prompts))


def _demo(prompt: str = "a person in a red shirt grins in a café, in daylight",
          other: str = "a person in a blue shirt grins in a café, in daylight") -> None:
    """A prompt's road through the bundled checkpoint, and what another prompt changes."""
    tiny = Path(__file__).resolve().parents[1] / "weights" / "tiny"
    encoder = TextEncoder.load(tiny / "model.safetensors", tiny / "gemma", dtype=torch.float32)
    ids, mask = encoder.tokenize([prompt, other, ""])
    with torch.no_grad():
        states = encoder.gemma(ids, mask)
        features = encoder.extractor(states, mask)
        filled, context = encoder.connector.fill(features, mask), encoder.connector(features, mask)
    pieces = [encoder.tokenizer.pieces[i] for i in encoder.tokenizer.encode(prompt)]
    print(f"prompt    {prompt!r}\nother     {other!r}\npieces    {' '.join(pieces)}")
    print(f"ids       {tuple(ids.shape)}: both and '', with {mask.sum(1).tolist()} real tokens")
    print(f"states    {len(states)} x {tuple(states[0].shape)}: embeddings, every layer of Gemma")
    print(f"features  {tuple(features.shape)}: one linear layer over all of them")
    print(f"context   {tuple(context.shape)}: every row is read by the video transformer")
    for what, rows in (("what the connector reads", filled), ("the context", context)):
        moved = (rows[0] - rows[1]).square().mean(-1).sqrt() > 1e-4
        print(f"the other prompt moves {moved.sum()} of the {encoder.length} rows of {what}")
    print("Notice: one other word moves every row of the context, because the connector looks "
          "everywhere, while Gemma looks only back.")


if __name__ == "__main__":
    sys.exit(command("text.py", lambda: _demo(*sys.argv[1:3])))
