"""Two looks at one run differ only by the weights: fixed clips, fixed noise, averaged weights.

Hardware: CPU, a second. Run: python -m pytest tests/test_validate.py
"""

import json
from argparse import Namespace
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from training import validate
from training.optim import EMA, MuonAdamW
from training.run import Run


@pytest.fixture
def run(tmp_path):
    """A run whose weight is 3 and whose averaged weight is 5."""
    named = {"w": nn.Parameter(torch.full((1,), 3.0))}
    run = Run(tmp_path, named, MuonAdamW({}, named), EMA(named))
    run.ema.shadow["w"].fill_(5.0)
    run.done = 7
    return run


def clips_of(*groups):
    return Namespace(groups=groups, batch=lambda part, generators: part,
                     names=lambda part: f"clips {part}")


def test_a_validation_loss_is_a_mean_over_what_was_found_and_names_a_bad_clip():
    values = {0: 1.0, 1: 2.0, 2: 6.0}

    def compute(part, generators):  # of the second loss only clips 0 and 2 count
        found = [i for i in part if i != 1]
        face = sum(values[i] for i in found) / len(found) if found else 0.0
        plain = sum(values[i] for i in part) / len(part)
        return torch.tensor([plain, 10 * face]), torch.tensor([len(part), len(found)]).float()
    for size in (1, 2, 3):
        found = validate.validation_loss(clips_of(range(3)), size, compute, 7)
        assert found == pytest.approx({"val_fm": 3.0, "val_face": 35.0}), size
    nobody = validate.validation_loss(clips_of(range(1, 2)), 1, compute, 7)
    assert nobody == {"val_fm": 2.0}, "no face, no mean"
    values[1] = float("nan")
    with pytest.raises(ValueError, match=r"got nan for val_fm at step 7, clips \[1\]; "):
        validate.validation_loss(clips_of(range(3)), 1, compute, 7)


def test_every_look_at_a_clip_has_noise_of_its_own_and_the_next_time_the_same():
    def noise(size):
        seen = []

        def compute(part, generators):
            seen.extend(torch.rand(1, generator=g).item() for g in generators)
            return torch.zeros(2), torch.ones(2)
        validate.validation_loss(clips_of(range(4)), size, compute, 0)
        return seen
    assert noise(1) == noise(4) and len(set(noise(2))) == 4 * validate.LOOKS


def test_averaged_weights_are_looked_at_and_the_line_belongs_to_the_step(run):
    def compute(part, generators):
        return run.model["w"].detach().repeat(2), torch.ones(2)

    def sample(indices):
        assert indices == list(range(validate.SHOWN)) and run.model["w"].item() == 5
        return [[torch.zeros(3, 8, 8)]] * 2
    validate.validate(run, clips_of(range(9)), 2, True, compute, sample)
    line = json.loads((run.folder / "log.jsonl").read_text())
    assert line == {"step": 8, "seconds": 0.0, "val_fm": 5.0, "val_face": 5.0}
    assert {path.name for path in run.folder.iterdir()} == {"log.jsonl", "sheet.png", "curves.png"}
    assert run.model["w"].item() == 3


@pytest.mark.parametrize("error", [
    OSError("disk full"), MemoryError("no memory"), torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")])
def test_a_sheet_that_cannot_be_made_does_not_end_a_training(run, capsys, error):
    def sample(indices):
        raise error
    validate.validate(run, clips_of(range(2)), 2, False, None, sample)
    assert capsys.readouterr().err == f"warning: no contact sheet at step 7: {error}\n"
    error = RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="shapes"):  # a mistake of ours
        validate.validate(run, clips_of(range(2)), 2, False, None, sample)
    (run.folder / "log.jsonl").write_text("no log\n")
    validate.draw_curves(run)
    assert capsys.readouterr().err.startswith("warning: expected a JSON object")


def test_a_row_of_the_sheet_is_a_reference_and_frames_of_its_own_video(monkeypatch):
    batch = SimpleNamespace(x0=torch.zeros(2, 6, 4), context=torch.zeros(2, 1, 1), grid=(2, 1, 3),
                            frame_rate=8.0, reference=torch.stack([torch.zeros(3, 8, 8)] * 2))
    batch.reference[1] += 1
    clips = SimpleNamespace(batch=lambda indices, generators: batch, null_context=torch.zeros(1, 1))
    vae = nn.Linear(1, 1)
    vae.time_scale, vae.space_scale = 4, 8
    vae.encode = lambda picture: picture.mean(dim=(3, 4), keepdim=True)
    vae.decode_tiles = lambda z: [z.mean().expand(1, 3, n, 8, 8) for n in (2, 3)]
    noises = []

    def denoise(model, *args, **options):
        noise = next(a for a in args if isinstance(a, torch.Tensor) and a.shape == (2, 6, 4))
        noises.append(noise)
        return torch.arange(2.0).view(2, 1, 1, 1, 1).expand(2, 4, 2, 1, 3)
    monkeypatch.setattr(validate, "denoise", denoise)
    rows = validate.sample_clips(clips, [4, 9], {}, None, vae, "tass", nullcontext())
    assert [len(row) for row in rows] == [6, 6]
    assert [[x.mean().item() for x in row] for row in rows] == [[0.0] * 6, [1.0] * 6]
    validate.sample_clips(clips, [4, 9], {}, None, vae, "tass", nullcontext())
    assert torch.equal(*noises) and not torch.equal(*noises[0])
