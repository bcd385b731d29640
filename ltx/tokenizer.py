"""Text -> ids: byte-pair encoding by Gemma 3's rules.

The idea. A language model reads numbers, and there are more words than it could have numbers for.
So it has pieces: common words whole, rare ones in parts, and for what nobody foresaw the bytes
themselves. Byte-pair encoding found the pieces by counting: join the most frequent pair of
neighbours, note it, and go on. Encoding a text repeats the noted joins in their order. A mistake
here is silent: other ids give another picture, and no shape complains.

LTX-2.3: the tokenizer is Gemma 3's, unchanged (`tokenizer.json` of its folder).
our reading: the tiny stand-in has its own vocabulary in the same format, see toy/vocabulary.py.

Conventions. ids are int64, BOS (2) in front, no EOS, no chat template, padded on the LEFT with 0.
A space is written as a low block inside pieces. Files are checked when they are read, so that
nothing fails in the middle of a prompt.

    tokenizer = Tokenizer("gemma-3-12b-it/tokenizer.json")
    ids, mask = tokenizer.encode_padded("A woman laughs in the rain.", 1024)   # (1024,) each

    python -m ltx.tokenizer                           # joins the words of a prompt, step by step

Read next: ltx/gemma.py
"""

import heapq
import os
import re
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from common.cli import command
from common.files import one_line, parse_json, read_text

SPACE = "\u2581"  # Gemma writes a space as this low block, so that a space can be part of a piece
BYTE_PIECES = [f"<0x{value:02X}>" for value in range(256)]
SPECIAL_PIECES = ["<pad>", "<eos>", "<bos>", "<unk>"]  # ids 0, 1, 2, 3


class Tokenizer:
    """Text -> ids with Gemma 3's rules, read from a Hugging Face `tokenizer.json`.

    LTX-2.3: (1) "added" pieces such as `<b>` or line breaks are cut out of the raw text first,
    leftmost and longest; (2) in what is between them every space becomes a low block; (3) byte-pair
    encoding: start from single characters and keep joining the neighbours whose pair stands highest
    in the list of merges; (4) a character that the vocabulary lacks becomes its UTF-8 bytes, one
    piece each, so nothing is ever unknown.

    source: path of a tokenizer.json, or its content. Raises ValueError when it is no such thing.
    """

    def __init__(self, source: str | os.PathLike | dict):
        data = source if isinstance(source, dict) else read_object(Path(source))
        _check_tokenizer(data)
        self.vocab: dict[str, int] = dict(data["model"]["vocab"])
        self.rank = {tuple(_parts(merge)): i for i, merge in enumerate(data["model"]["merges"])}
        added = {token["content"]: token["id"] for token in data.get("added_tokens") or []}
        self.vocab.update(added)
        self.pieces = {index: piece for piece, index in self.vocab.items()}
        self.pad, self.bos = self.vocab["<pad>"], self.vocab["<bos>"]
        # A regex takes the first alternative that fits, so the longest goes first; none never fits.
        longest_first = sorted(added, key=len, reverse=True)
        self._added = re.compile("(" + ("|".join(map(re.escape, longest_first)) or r"\b\B") + ")")
        # No piece of Gemma's has a space after a letter, so no merge crosses into the next word and
        # words can be encoded one by one: exact, and fast. Another vocabulary is not split.
        crosses = any(SPACE in piece.lstrip(SPACE) for piece in self.vocab if piece not in added)
        word = ".+" if crosses else f"{SPACE}*[^{SPACE}]+|{SPACE}+"
        self._words = re.compile(word, re.DOTALL)

    def _encode_word(self, word: str) -> list[int]:
        """Join the pair that stands highest in the list, the leftmost of equals, until none does.

        The pairs wait in a heap: searching all of them before each join would take minutes for
        100,000 characters without a space. A joined part leaves "" behind, and `after` and `before`
        (the places of a part's neighbours) skip it.
        """
        parts: list[str] = []
        for char in word:
            bytes_of_it = (BYTE_PIECES[b] for b in char.encode("utf-8", "replace"))
            parts += [char] if char in self.vocab else bytes_of_it
        parts.append("")  # the end, and, as place -1, the beginning too: "" is in no pair
        after, before = list(range(1, len(parts) + 1)), list(range(-1, len(parts) - 1))
        heap: list[tuple[int, int, str, str]] = []

        def offer(i: int, j: int) -> None:
            if (rank := self.rank.get((parts[i], parts[j]))) is not None:
                heapq.heappush(heap, (rank, i, parts[i], parts[j]))

        for i, j in enumerate(after[:-1]):
            offer(i, j)
        while heap:
            _, i, left, right = heapq.heappop(heap)
            j = after[i]
            if (parts[i], parts[j]) != (left, right):
                continue  # one of the two has been joined since
            parts[i], parts[j] = left + right, ""
            after[i] = after[j]
            before[after[i]] = i
            offer(before[i], i)
            offer(i, after[i])
        return [self.vocab[part] for part in parts if part]

    def raw_ids(self, text: str) -> list[int]:
        """The ids of exactly this text: nothing stripped, no BOS."""
        ids: list[int] = []
        for i, span in enumerate(self._added.split(text)):  # the odd entries are the added pieces
            if i % 2:
                ids.append(self.vocab[span])
            else:
                for word in self._words.findall(span.replace(" ", SPACE)):
                    ids += self._encode_word(word)
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt; "" gives [BOS]. LTX-2.3: white space stripped, BOS in front, no EOS."""
        return [self.bos, *self.raw_ids(text.strip())]

    def encode_padded(self, text: str, length: int) -> tuple[Tensor, Tensor]:
        """Ids and mask, (length,) int64 each. LTX-2.3: padded on the left; cut off at the end."""
        if length < 1:
            raise ValueError(f"expected a length of at least 1, got {length}; BOS needs one place")
        ids = self.encode(text)[:length]
        padding = length - len(ids)
        mask = [0] * padding + [1] * len(ids)
        return torch.tensor([self.pad] * padding + ids), torch.tensor(mask)


def read_object(path: Path) -> dict:
    """One file of a Gemma folder: a JSON object. Raises ValueError, one line, for anything else."""
    if not path.is_file():
        raise ValueError(f"expected {path.name} in {path.parent}, got no such file; "
                         "download the whole Gemma folder")
    try:
        data = parse_json(read_text(path))
    except (ValueError, OSError) as error:  # broken JSON, or bytes that are no text
        raise ValueError(f"expected JSON in {path}, got {one_line(error)}; "
                         "download it again") from error
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object in {path}, got a {type(data).__name__}; "
                         "download it again")
    return data


def _parts(merge: object) -> object:
    return merge.split(" ") if isinstance(merge, str) else merge  # old files "a b", new ["a", "b"]


def _wrong(expected: str, got: str) -> ValueError:
    return ValueError(f"expected {expected}, got {got}; use Gemma 3's tokenizer.json")


def _check_tokenizer(data: dict) -> None:
    """Whether this is Gemma's kind of tokenizer, with everything that encoding will look up."""
    model, normalizer = data.get("model") or {}, data.get("normalizer") or {}
    added = data.get("added_tokens") or []
    if not (isinstance(model, dict) and isinstance(normalizer, dict) and isinstance(added, list)):
        raise _wrong("objects 'model' and 'normalizer' and a list 'added_tokens'", "something else")
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        kind = f"{one_line(model['type'])} without it" if "type" in model else None
        raise _wrong("BPE with byte_fallback", kind or "no 'model' of a known type")
    if absent := {"vocab", "merges"} - set(model):
        raise _wrong(f"{min(absent)!r} in the model", "none")
    _check_pieces(model["vocab"], model["merges"], added)
    if missing := [p for p in SPECIAL_PIECES + BYTE_PIECES if p not in model["vocab"]]:
        raise _wrong(f"{missing[0]} in the vocabulary", "none")
    if normalizer.get("pattern") != {"String": " "} or normalizer.get("content") != SPACE:
        raise _wrong(f"' ' to become '{SPACE}'", f"normalizer {one_line(normalizer, 80)}")
    for token in added:
        for flag in ("normalized", "lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise ValueError(f"expected added tokens without {flag}, "
                                 f"got {token['content']!r:.40} with it; clear it")


def _check_pieces(vocab: object, merges: object, added: list) -> None:
    """Ids are numbers, and merges are pairs that make a piece of the vocabulary."""
    if not (isinstance(vocab, dict) and isinstance(merges, list)):
        raise _wrong("an object 'vocab' and a list 'merges'", "something else")
    for token in added:
        content = token.get("content") if isinstance(token, dict) else None
        if not (isinstance(content, str) and content and "id" in token):
            raise _wrong("added tokens with a content and an id", f"{token!r:.40}")
    for index in (*vocab.values(), *(token["id"] for token in added)):
        if type(index) is not int or not 0 <= index < 2**31:
            raise _wrong("ids 0, 1, 2, ... in the vocabulary", f"{index!r:.40}")
    for merge in merges:
        pair = _parts(merge)
        if not (isinstance(pair, list) and len(pair) == 2
                and all(isinstance(part, str) and part for part in pair)):
            raise _wrong("merges of two pieces", f"{merge!r:.40}")
        if pair[0] + pair[1] not in vocab:
            raise _wrong(f"{pair[0] + pair[1]!r:.40} of a merge in the vocabulary", "none")


def _demo(prompt: str = "a person grins in a café") -> None:
    """Every word of a prompt as characters, and after each join, with the bundled vocabulary."""
    root = Path(__file__).resolve().parents[1]
    tokenizer = Tokenizer(root / "weights" / "tiny" / "gemma" / "tokenizer.json")
    print(f"{len(tokenizer.vocab)} pieces, {len(tokenizer.rank)} merges (Gemma 3: 514,906 merges)")
    for word in tokenizer._words.findall(prompt.replace(" ", SPACE)):
        parts = list(word)
        print("  " + " ".join(parts))
        while ranks := [tokenizer.rank[p] for p in pairwise(parts) if p in tokenizer.rank]:
            first = next(p for p in pairwise(parts) if tokenizer.rank.get(p) == min(ranks))
            at = list(pairwise(parts)).index(first)
            parts[at : at + 2] = ["".join(first)]
            print(f"    merge {min(ranks):3d}: " + " ".join(parts))
    print("ids " + " ".join(f"{i} ({tokenizer.pieces[i]})" for i in tokenizer.encode(prompt)))
    print("Notice: a word of the captions becomes one piece, é, which they lack, its two bytes.")


if __name__ == "__main__":
    sys.exit(command("tokenizer.py", lambda: _demo(*sys.argv[1:2])))
