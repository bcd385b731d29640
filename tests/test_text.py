"""What is shown: feature extractor and connector give the numbers of the reference implementation,
and everything from the prompt to the context holds together.

Routes: golden vectors (reference code, small random weights) and properties of our own.
Hardware: CPU, seconds. Command: python -m pytest tests/test_text.py
"""

import pytest
import torch
from safetensors.torch import load_file
from test_gemma import GOLDEN, TINY, close, golden_config, randomise
from test_tokenizer import CAPTIONS

from ltx import text
from ltx.checkpoint import load_weights, save_checkpoint
from ltx.gemma import GemmaConfig, GemmaTextModel, save_gemma
from ltx.text import Connector, FeatureExtractor, TextEncoder, encode_once
from ltx.tokenizer import Tokenizer
from toy.vocabulary import train_bpe

TRANSFORMER = {"connector_num_attention_heads": 2, "connector_attention_head_dim": 8,
               "connector_num_layers": 2, "connector_num_learnable_registers": 4,
               "text_max_length": 32}


def tiny_encoder():
    data = train_bpe(CAPTIONS, 400)
    sizes = GemmaConfig.from_dict({**TINY, "vocab_size": len(data["model"]["vocab"])})
    extractor = FeatureExtractor(TRANSFORMER, sizes.hidden_size, sizes.num_hidden_layers + 1)
    parts = Tokenizer(data), GemmaTextModel(sizes), extractor, Connector(TRANSFORMER)
    return randomise(TextEncoder(*parts, 32), 3), data


@pytest.mark.parametrize("case", ["left_pad", "right_pad"])
def test_extractor_and_connector_equal_the_golden_context(case):
    path = GOLDEN / "text_connector.safetensors"
    config, io = golden_config(path)["transformer"], load_file(path)
    states, mask = io[f"io.{case}.hidden_states"], io[f"io.{case}.attention_mask"]
    with torch.device("meta"):
        extractor = FeatureExtractor(config, states.shape[-1], len(states))
        connector = Connector(config)
    load_weights(extractor, path, text.EXTRACTOR_PREFIX)
    load_weights(connector, path, text.CONNECTOR_PREFIX)
    with torch.no_grad():
        normed = extractor.normalised(list(states), mask)
        features = extractor(list(states), mask)
        close(normed, io[f"io.{case}.normed"], 1e-5, "normalised states")
        close(features, io[f"io.{case}.features"], 1e-4, "features")
        close(connector(features, mask), io[f"io.{case}.context"], 1e-4, "context")


def test_registers_fill_what_the_prompt_leaves_free():
    connector = Connector(TRANSFORMER)
    features = torch.randn(2, 8, 16)
    mask = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 0, 0, 0, 1]])
    filled = connector.fill(features, mask)
    assert torch.equal(filled[0, :3], features[0, 5:])
    assert torch.equal(filled[1, :3], features[1, [0, 2, 7]])
    for place in range(3, 8):
        register = connector.learnable_registers[place % 4]
        assert torch.equal(filled[0, place], register) and torch.equal(filled[1, place], register)
    with pytest.raises(ValueError, match="registers"):
        connector.fill(torch.randn(1, 6, 16), torch.ones(1, 6))


def test_the_context_does_not_depend_on_padding():
    encoder, _ = tiny_encoder()
    ids, mask = encoder.tokenize([CAPTIONS[0][:20], ""])
    with torch.no_grad():
        close(encoder(ids, mask), encoder(torch.where(mask > 0, ids, 55), mask), 0, "context")


def test_gradients_reach_every_parameter():
    encoder, _ = tiny_encoder()
    context = encoder.encode(["A woman laughs.", ""])
    assert context.shape == (2, 32, 16)
    (context * torch.randn_like(context)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and 0 < parameter.grad.abs().max() < torch.inf, name


@pytest.fixture
def saved(tmp_path):
    """An encoder, the two places it is saved at, and what is there."""
    encoder, data = tiny_encoder()
    save_gemma(tmp_path / "gemma", encoder.gemma, data)
    tensors = {text.EXTRACTOR_PREFIX + n: t for n, t in encoder.extractor.state_dict().items()}
    tensors |= {text.CONNECTOR_PREFIX + n: t for n, t in encoder.connector.state_dict().items()}
    path = tmp_path / "ltx.safetensors"
    save_checkpoint(path, tensors, {"transformer": TRANSFORMER}, {})
    return encoder, path, tmp_path / "gemma", tensors, data


def test_an_encoder_survives_the_disk_and_bfloat16_and_its_parts_may_come_one_by_one(saved):
    encoder, path, gemma, _, _ = saved
    loaded = TextEncoder.load(path, gemma)
    half = TextEncoder.load(path, gemma, dtype=torch.bfloat16)
    with torch.no_grad():
        context, rough = encoder.encode(CAPTIONS), half.encode(CAPTIONS)
        assert torch.equal(context, loaded.encode(CAPTIONS))
    once, counts = encode_once(CAPTIONS, path, gemma)
    assert torch.equal(once, context)
    assert counts == [len(encoder.tokenizer.encode(caption)) for caption in CAPTIONS]
    assert rough.dtype == torch.bfloat16
    error = (rough.float() - context).square().mean().sqrt().item()
    assert error < 0.2, f"root mean square difference {error:.3f} (context has 1)"
    with pytest.raises(ValueError, match="list of prompts"):
        loaded.encode("A woman laughs.")


def test_parts_that_do_not_fit_are_refused_before_gemma_is_read(saved, monkeypatch):
    _, path, gemma, tensors, data = saved
    monkeypatch.setattr(text, "load_gemma", lambda *_: pytest.fail("Gemma was loaded first"))

    def line(folder=gemma, stored=tensors, **config):
        save_checkpoint(path, stored, {"transformer": TRANSFORMER | config}, {})
        with pytest.raises(ValueError) as caught:
            TextEncoder.load(path, folder)
        assert "\n" not in str(caught.value) and "; " in str(caught.value)
        return str(caught.value)

    pieces = len(data["model"]["vocab"])
    for name, sizes in (("narrow", {"hidden_size": 20, "vocab_size": pieces}),
                        ("few", {"vocab_size": pieces - 1})):
        other = GemmaTextModel(GemmaConfig.from_dict({**TINY, **sizes}))
        save_gemma(gemma.parent / name, other, data)
    assert "the Gemma it was trained with: " in (told := line(gemma.parent / "narrow"))
    assert told.endswith("has 7 layers of 20")
    assert f"expected ids below {pieces - 1} " in line(gemma.parent / "few")
    without = {name: tensor for name, tensor in tensors.items() if "registers" not in name}
    assert "learnable_registers" in (told := line(stored=without)) and "trained with" not in told
    assert "a multiple of the 4 registers" in line(text_max_length=30)
    assert "expected connector_norm_output = True" in line(connector_norm_output=False)
    save_checkpoint(path, tensors, {"vae": {}}, {})
    with pytest.raises(ValueError, match="connector_num_attention_heads"):
        TextEncoder.load(path, gemma)


def test_the_demo_says_what_another_word_moves(capsys):
    """Gemma reads only back, the connector reads everything."""
    text._demo("a person nods in the snow", "a person nods at night")
    told = capsys.readouterr().out
    assert "moves 3 of the 48 rows of what the connector reads" in told
    assert "moves 48 of the 48 rows of the context" in told
