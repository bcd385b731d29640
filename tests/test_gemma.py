"""What is shown: our Gemma 3 gives the states of the reference code and of `transformers`.

Routes: golden vectors (reference code, small random weights), the `transformers` library on random
folders (skipped where it is not installed), and properties of our own, such as that padding never
matters. Hardware: CPU, seconds. Command: python -m pytest tests/test_gemma.py
"""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_loading import in_float8, matrices, packed

from ltx.checkpoint import TensorFile
from ltx.gemma import (
    FULL,
    GEMMA_PREFIXES,
    SLIDING,
    GemmaConfig,
    GemmaTextModel,
    attention_allowed,
    load_gemma,
    save_gemma,
)

GOLDEN = Path(__file__).parent / "golden"
TINY = {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 7,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10,
        "query_pre_attn_scalar": 13, "sliding_window": 5}
ROPE = {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        SLIDING: {"rope_type": "default", "rope_theta": 2e4}}


def close(ours, theirs, tolerance, what):
    worst = (ours - theirs).abs().max().item()
    assert worst <= tolerance, f"{what}: largest difference {worst:.2e}, allowed {tolerance:.0e}"


def golden_config(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["config"])


def randomise(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def tiny_gemma(seed, **sizes):
    return randomise(GemmaTextModel(GemmaConfig.from_dict({**TINY, **sizes})), seed)


def left_padded(batch, length, vocab, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (batch, length), generator=generator)
    counts = torch.tensor([length, 1, length // 2, length - 3])[:batch]
    mask = (torch.arange(length) >= length - counts[:, None]).long()
    return ids * mask, mask


@torch.no_grad()
def states_of(gemma, ids, mask):
    """All states, those of the padding set to zero."""
    return torch.stack(gemma(ids, mask)) * mask[None, :, :, None]


@torch.no_grad()
def library_states(library, ids, mask):
    states = library(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return torch.stack(states) * mask[None, :, :, None]


def test_gemma_equals_the_golden_states(tmp_path):
    path = GOLDEN / "gemma3.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(golden_config(path)))
    (tmp_path / "model.safetensors").symlink_to(path.resolve())
    io = load_file(path)
    states = states_of(load_gemma(tmp_path), io["io.input_ids"], io["io.attention_mask"])
    close(states, io["io.hidden_states"], 1e-4, "Gemma states")


def random_sizes(seed):
    """A tiny Gemma 3 config in the names of transformers; every setting we read is drawn."""
    draw = random.Random(seed)
    heads, layers = draw.choice([(4, 2), (6, 2), (3, 1), (2, 2)]), draw.randint(6, 8)
    pattern = draw.choice([2, 3, 6])  # so the last layer, which gets the final norm, is of any kind
    return {
        "vocab_size": 97, "hidden_size": draw.choice([24, 36, 48]),
        "intermediate_size": draw.choice([20, 40]), "num_hidden_layers": layers,
        "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
        "head_dim": draw.choice([6, 10, 16]), "query_pre_attn_scalar": draw.choice([9, 13, 16]),
        "sliding_window": draw.randint(2, 8), "rms_norm_eps": draw.choice([1e-6, 1e-3]),
        "layer_types": [SLIDING if (i + 1) % pattern else FULL for i in range(layers)],
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": draw.choice([2.0, 8.0]), "rope_theta": 5e5},
            SLIDING: {"rope_type": "default", "rope_theta": draw.choice([1e4, 300.0])}},
    }


def write_by_transformers(folder, prefix, sharded, sizes):
    """A random model of these sizes, written by transformers; returns its kind."""
    library = pytest.importorskip("transformers")
    config = library.Gemma3TextConfig(**sizes)
    kind = {"": library.Gemma3TextModel, "model.": library.Gemma3ForCausalLM}.get(prefix)
    if kind is None:  # multimodal, in the hub's layout or in the library's own
        kind = library.Gemma3ForConditionalGeneration
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        config = library.Gemma3Config(text_config=config.to_dict(), vision_config=vision,
                                      image_token_index=96)
    layout = {"save_original_format": prefix != "model.language_model."}
    model = randomise(kind(config), 5)
    model.save_pretrained(folder, max_shard_size="15KB" if sharded else "1GB", **layout)
    assert (folder / "model.safetensors.index.json").exists() == sharded
    return kind


@pytest.mark.parametrize("prefix", GEMMA_PREFIXES)
def test_gemma_equals_transformers_from_its_own_folders(prefix, tmp_path):
    seed, sharded = GEMMA_PREFIXES.index(prefix), prefix in ("model.", "language_model.model.")
    kind = write_by_transformers(tmp_path, prefix, sharded, random_sizes(seed))
    names = {name for path in tmp_path.glob("*.safetensors") for name in load_file(path)}
    assert prefix + "embed_tokens.weight" in names, "the naming this case is about"
    library = kind.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32)
    text_model = library.model.language_model if "language_model" in prefix else library
    ids, mask = left_padded(4, 21, 96, seed)
    expected = library_states(text_model, ids, mask)
    close(states_of(load_gemma(tmp_path), ids, mask), expected, 1e-4, f"states ({prefix})")


def test_fields_that_config_json_leaves_out_have_the_librarys_defaults():
    theirs, ours = pytest.importorskip("transformers").Gemma3TextConfig(), GemmaConfig.from_dict({})
    for name in (*TINY, "rms_norm_eps"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert list(ours.layer_types) == theirs.layer_types
    assert ours.global_theta == theirs.rope_parameters[FULL]["rope_theta"]
    assert ours.local_theta == theirs.rope_parameters[SLIDING]["rope_theta"]
    assert ours.global_factor == theirs.rope_parameters[FULL].get("factor", 1.0)
    big = GemmaConfig.from_dict({"text_config": {"num_hidden_layers": 48, "layer_types": None}})
    assert [i for i, kind in enumerate(big.layer_types) if kind == FULL] == [*range(5, 48, 6)]


def test_a_saved_folder_loads_in_ours_and_in_transformers(tmp_path):
    gemma = tiny_gemma(6, hidden_size=32, rope_parameters=ROPE)
    save_gemma(tmp_path, gemma, {})
    ids, mask = left_padded(3, 16, 96)
    states = states_of(gemma, ids, mask)
    assert torch.equal(states, states_of(load_gemma(tmp_path), ids, mask))
    kind = pytest.importorskip("transformers").Gemma3ForCausalLM
    library = kind.from_pretrained(tmp_path, attn_implementation="eager")
    close(states, library_states(library, ids, mask), 1e-4, "saved folder in transformers")


def test_attention_sees_a_window_of_the_past_and_no_padding():
    _, mask = left_padded(3, 9, 50)
    allowed = attention_allowed(mask, 4)
    for b in range(3):
        for q in range(9):
            for k in range(9):
                assert allowed[b, 0, q, k] == ((q - 4 < k <= q and mask[b, k] == 1) or q == k)


def test_padding_never_reaches_a_real_token():
    gemma = tiny_gemma(7)
    ids, mask = left_padded(3, 16, 97)
    states = states_of(gemma, ids, mask)
    close(states, states_of(gemma, torch.where(mask > 0, ids, 55), mask), 0, "other padding")
    longer = (torch.nn.functional.pad(x, (6, 0)) for x in (ids, mask))
    close(states, states_of(gemma, *longer)[:, :, 6:], 1e-4, "more padding")


def test_the_factor_of_the_embeddings_is_rounded_to_the_type_of_the_weights():
    """sqrt(3840) is 61.97, and 62 in bfloat16: Gemma was trained with the rounded one."""
    gemma = tiny_gemma(0, hidden_size=3840, num_hidden_layers=1).bfloat16()
    ids = torch.tensor([[2, 3]])
    with torch.no_grad():
        first = gemma(ids, torch.ones_like(ids))[0]
    assert torch.equal(first, gemma.embed_tokens(ids) * 62)


def test_every_gemma_tensor_is_read_once_and_strangers_never(tmp_path, monkeypatch):
    gemma, path, read = tiny_gemma(8), tmp_path / "model.safetensors", []
    save_gemma(tmp_path, gemma, {})
    stored = load_file(path)
    save_file(stored | {"vision_tower.x": torch.ones(2), "lm_head.weight": torch.ones(2)}, path)
    get_tensor = TensorFile.get_tensor
    monkeypatch.setattr(TensorFile, "get_tensor", lambda f, n: read.append(n) or get_tensor(f, n))
    kinds = {tensor.dtype for tensor in load_gemma(tmp_path, torch.bfloat16).state_dict().values()}
    assert sorted(read) == sorted(stored) and kinds == {torch.bfloat16}


def refused(folder, words):
    with pytest.raises(ValueError, match=words) as caught:
        load_gemma(folder)
    assert "\n" not in str(caught.value)


BROKEN_CONFIGS = {
    "expected model_type gemma3 or gemma3_text, got llama; ": {"model_type": "llama"},
    "expected attn_logit_softcapping = None, got 50.0; ": {"attn_logit_softcapping": 50.0},
    "expected an integer above 0 .* for num_hidden_layers, got 0; ": {"num_hidden_layers": 0},
    "expected 7 layer_types, got 1; ": {"layer_types": [FULL]},
    "expected sliding_attention or full_attention, got 'x'; ": {"layer_types": ["x"] * 7},
    "expected query heads a multiple of .*; ": {"num_attention_heads": 3},
    "expected linear rotary scaling .*, got yarn; ": {"rope_scaling": {"rope_type": "yarn"}},
    "expected the settings of a Gemma 3 in .*; ": {"text_config": 3},
    r"expected model\.layers\.0\.mlp\.\w+\.weight of shape .*; ": {"intermediate_size": 41},
    r"expected tensor .*, got none \(13 of 106 missing\); ": {"num_hidden_layers": 8,
                                                              "layer_types": None},
}


def test_a_config_of_another_model_or_another_size_gets_one_line(tmp_path):
    gemma = tiny_gemma(0)
    save_gemma(tmp_path, gemma, {})
    for words, change in BROKEN_CONFIGS.items():
        content = gemma.config.to_dict() | change
        (tmp_path / "config.json").write_text(json.dumps(content))
        refused(tmp_path, words)


def sharded_folder(folder):
    """A good folder whose tensors are in two files, with an index."""
    save_gemma(folder, tiny_gemma(0), {})
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({name: t for name, t in tensors.items() if where[name] == file}, folder / file)
    index = {"weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def replace(path, tensor):
    """The first tensor of a file replaced, or with None left out."""
    tensors = load_file(path)
    tensors[min(tensors)] = tensor
    save_file({name: t for name, t in tensors.items() if t is not None}, path)


INDEX, SHARD = "model.safetensors.index.json", "model-1.safetensors"
BROKEN_FOLDERS = {
    r"expected config\.json in .*, got no such file; ": lambda f: (f / "config.json").unlink(),
    r"expected JSON in .*index\.json, got .*; ": lambda f: (f / INDEX).write_text("<html>"),
    "expected a 'weight_map' in .*, got none; ": lambda f: (f / INDEX).write_text("{}"),
    r"got no file at .*model\.safetensors; ": lambda f: (f / INDEX).unlink(),
    f"expected the 2 files of .*, got no {SHARD}; ": lambda f: (f / SHARD).unlink(),
    f"cut off: .* bytes at .*{SHARD}; ": lambda f: os.truncate(f / SHARD, 5000),
    r"expected tensor model\..*, got none \(1 of 93 missing\); ":
        lambda f: replace(f / SHARD, None),
    r"of shape \(.*\) in .*, got \(1, 2\); ": lambda f: replace(f / SHARD, torch.ones(1, 2)),
}


def test_a_broken_folder_gets_one_line(tmp_path):
    for i, (words, damage) in enumerate(BROKEN_FOLDERS.items()):
        folder = sharded_folder(tmp_path / str(i))
        load_gemma(folder)
        damage(folder)
        refused(folder, words)


# ------------------------------------------------------------ float8


@pytest.mark.parametrize("offload", ["none", "disk"])
@pytest.mark.parametrize("rows", [True, False])
def test_a_float8_folder_is_read_with_its_scales_also_from_another_file(rows, offload, tmp_path):
    """The states are those of the same numbers written out in full."""
    gemma = tiny_gemma(4)
    save_gemma(tmp_path / "plain", gemma, {})
    save_gemma(tmp_path, gemma, {})
    stored = load_file(tmp_path / "model.safetensors")
    names = matrices(stored, "layers.")
    eights = in_float8(stored, names, rows)
    full = {n: eights[n].float() * eights[n.removesuffix("weight") + "weight_scale"] for n in names}
    save_file(stored | full, tmp_path / "plain" / "model.safetensors")
    parts = [{n: t for n, t in eights.items() if ("scale" in n) == part} for part in (True, False)]
    for number, part in enumerate(parts):
        save_file(part, tmp_path / f"model-{number}.safetensors")
    where = {name: f"model-{number}.safetensors" for number, part in enumerate(parts)
             for name in part}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    ids, mask = left_padded(4, 12, 96)
    found = states_of(load_gemma(tmp_path, torch.float32, offload=offload), ids, mask)
    expected = states_of(load_gemma(tmp_path / "plain"), ids, mask)
    assert len(names) == 49 and torch.equal(found, expected)
    off = (found - states_of(gemma, ids, mask)).norm() / found.norm()
    assert off < 0.1, f"{off:.3f}: what float8 costs; without its scales it is 0.39"


def test_a_folder_whose_numbers_mean_something_else_is_refused(tmp_path):
    save_gemma(tmp_path, tiny_gemma(0), {})
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    first, second, *_ = matrices(stored, "layers.3.self_attn")
    for tensors, words in packed(stored, first, second).values():
        save_file(tensors, path)
        refused(tmp_path, f"{words}.*the whole folder in bf16$")
