"""Text -> ids: byte-pair encoding by Gemma 3's rules, and a way to make a small vocabulary of the same kind.

The idea. A language model reads numbers, and there are more words than it could have numbers for. So it has pieces:
common words whole, rare ones in parts, and for what nobody foresaw the bytes themselves. Byte-pair encoding finds the
pieces by counting: join the most frequent pair of neighbours, note it, and go on. Encoding a text repeats the noted joins
in their order. An error here is silent: other ids give another picture, and no shape complains.

LTX-2.3: the tokenizer is Gemma 3's, unchanged (`tokenizer.json` of its folder).
our reading: the tiny stand-in has its own vocabulary, made by `train_bpe` in Gemma's file format.

Conventions. ids are int64, BOS (2) in front, no EOS, no chat template, padded on the LEFT with 0. A space is written as a
low block inside pieces. Files are checked when they are read, so that nothing fails in the middle of a prompt.

    tokenizer = Tokenizer("gemma-3-12b-it/tokenizer.json")
    ids, mask = tokenizer.encode_padded("A woman laughs in the rain.", 1024)   # (1024,) each

    python -m ltx.tokenizer                                                        # joins words of a prompt, step by step

Read next: gemma.py
"""

import heapq
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from common.files import one_line, parse_json, read_text

SPACE = "\u2581"  # Gemma writes a space as this character (a low block), so that a space can be part of a piece
BYTE_PIECES = [f"<0x{value:02X}>" for value in range(256)]
BYTE_OF_PIECE = {piece: bytes([value]) for value, piece in enumerate(BYTE_PIECES)}
SPECIAL_PIECES = ["<pad>", "<eos>", "<bos>", "<unk>"]  # ids 0, 1, 2, 3


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
        data = source if isinstance(source, dict) else read_object(Path(source))
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


def read_object(path: Path) -> dict:
    """One file of a Gemma folder: a JSON object."""
    if not path.is_file():
        raise ValueError(f"expected {path.name} in {path.parent}, got no such file; download the whole Gemma folder")
    try:
        data = parse_json(read_text(path))
    except (ValueError, OSError) as error:  # broken JSON, or bytes that are no text
        raise ValueError(f"expected JSON in {path}, got {one_line(error)}; download it again") from error
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object in {path}, got a {type(data).__name__}; download it again")
    return data


def _check_tokenizer(data: dict) -> None:
    model, normalizer, added = data.get("model") or {}, data.get("normalizer") or {}, data.get("added_tokens") or []
    if not (isinstance(model, dict) and isinstance(normalizer, dict) and isinstance(added, list)):
        raise ValueError("expected objects 'model' and 'normalizer' and a list 'added_tokens', got something else; use "
                         "Gemma 3's tokenizer.json")
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        kind = f"{one_line(model['type'])} without it" if "type" in model else "no 'model' of a known type"
        raise ValueError(f"expected BPE with byte_fallback, got {kind}; use Gemma 3's tokenizer.json")
    if absent := {"vocab", "merges"} - set(model):
        raise ValueError(f"expected {min(absent)!r} in the model, got none; use Gemma 3's tokenizer.json")
    _check_pieces(model["vocab"], model["merges"], added)
    if missing := [piece for piece in SPECIAL_PIECES + BYTE_PIECES if piece not in model["vocab"]]:
        raise ValueError(f"expected {missing[0]} in the vocabulary, got none; use Gemma 3's tokenizer.json")
    if normalizer.get("pattern") != {"String": " "} or normalizer.get("content") != SPACE:
        raise ValueError(f"expected ' ' to become '{SPACE}', got normalizer {one_line(normalizer, 80)}; use Gemma 3's file")
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


def _demo(prompt: str = "a person grins in a café") -> None:
    """Every word of a prompt as characters, and after each join, with the bundled vocabulary."""
    tokenizer = Tokenizer(Path(__file__).resolve().parents[1] / "weights" / "tiny" / "gemma" / "tokenizer.json")
    print(f"{len(tokenizer.vocab)} pieces, {len(tokenizer.rank)} merges in their order (Gemma 3: 514,906 merges)")
    for word in tokenizer._words.findall(prompt.replace(" ", SPACE)):
        pieces = list(word)
        print("  " + " ".join(pieces))
        while ranks := [r for r in (tokenizer.rank.get(pair) for pair in pairwise(pieces)) if r is not None]:
            at = next(i for i, pair in enumerate(pairwise(pieces)) if tokenizer.rank.get(pair) == min(ranks))
            pieces[at:at + 2] = [pieces[at] + pieces[at + 1]]
            print(f"    merge {min(ranks):3d}: " + " ".join(pieces))
    ids = tokenizer.encode(prompt)
    print(f"ids {ids}: {' '.join(tokenizer.pieces[i] for i in ids)}\nback to text: {tokenizer.decode(ids)!r}")
    print("Notice: a word that the captions had becomes one piece, others stay in parts, é becomes its two bytes.")


if __name__ == "__main__":
    try:
        _demo(*sys.argv[1:2])
    except ValueError as error:
        print(f"tokenizer.py: error: {error}", file=sys.stderr)
        sys.exit(2)
