"""A small vocabulary of Gemma's kind: byte-pair training, the counting half of ltx/tokenizer.py.

The idea. Start from single characters, make the most frequent pair of neighbours one piece, and go
on until the vocabulary is full. The order of the joins is all that encoding needs. Joins never
cross words: a piece that did would make the pieces of a word depend on the word before it.

our reading: the bundled tiny model has a vocabulary of its own, because Gemma's embedding table
alone is a billion numbers. The file is of Gemma's form, so Tokenizer reads both.

Conventions. Ids: <pad> <eos> <bos> <unk>, 256 byte pieces, the characters of the texts sorted, then
one piece per join. The same texts give the same vocabulary.

    tokenizer_json = train_bpe(["a person laughs", "a person turns left"], 300)
    ids = Tokenizer(tokenizer_json).encode("a person laughs")

Read next: toy/pretrain.py
"""

import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

from ltx.tokenizer import BYTE_PIECES, SPACE, SPECIAL_PIECES


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict:
    """A vocabulary for `texts` as the content of a Gemma-style tokenizer.json.

    Joins the most frequent pair (of equals the alphabetically first) until vocab_size is reached or
    no pair occurs twice. Raises ValueError when vocab_size is too small for bytes and characters.
    """
    spaced = (text.strip().replace(" ", SPACE) for text in texts)
    words = Counter(word for text in spaced for word in re.findall(f"{SPACE}*[^{SPACE}]+", text))
    pieces = SPECIAL_PIECES + BYTE_PIECES + sorted({SPACE}.union(*words))
    if vocab_size < len(pieces):
        raise ValueError(f"expected vocab_size >= {len(pieces)} (bytes and characters), "
                         f"got {vocab_size}; raise it")
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
    """All that Hugging Face's `tokenizers` library wants to see in a file of Gemma's form."""
    off = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bos = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    first, second = ({"Sequence": {"id": "AB"[i], "type_id": i}} for i in range(2))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": p, **off, "special": True}
                         for i, p in enumerate(SPECIAL_PIECES)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        # As in Gemma's file. It cuts nothing: the normalizer has already replaced every space.
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "},
                          "behavior": "MergedWithPrevious", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing", "single": [bos, first], "pair": [bos, first, second],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>",
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True,
                  "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": merges},
    }
