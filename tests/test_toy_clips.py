"""Clips of the procedural world: rows, captions that fit, references of the same person.

Hardware: CPU, seconds. Run: python -m pytest tests/test_toy_clips.py
"""

from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.seeds import seeded
from ltx.checkpoint import read_metadata
from ltx.vae import VideoVAE
from reference import patchify
from toy import clips, world
from toy.config import FRAME_RATE, FRAMES, GRID, SIZE

TINY = Path(__file__).resolve().parent.parent / "weights" / "tiny"


@pytest.fixture(scope="module")
def vae():
    return VideoVAE.load(TINY / "model.safetensors", dtype=torch.float32)


class FakeText:
    """A context per caption that says which one it is: its length."""

    def eval(self):
        return self

    def encode(self, captions: list[str]) -> torch.Tensor:
        return torch.tensor([float(len(caption)) for caption in captions]).view(-1, 1, 1)


def kept(rows: dict) -> clips.KeptClips:
    """Clips whose latents are their own number."""
    count = len(rows["person"])
    numbers = np.arange(count, dtype=np.float32)[:, None]
    made = clips.KeptClips(rows, numbers[:, :, None], numbers, np.tile(numbers[:, None], (1, 9, 4)))
    made.use_text(FakeText())
    return made


def test_the_sizes_are_those_of_the_bundled_checkpoint(vae):
    told = read_metadata(TINY / "model.safetensors")["config"]["inference"]
    assert (told["width"], told["height"], told["num_frames"]) == (SIZE, SIZE, FRAMES)
    assert told["frame_rate"] == FRAME_RATE and told["schedule_tokens"] == prod(GRID)
    with torch.no_grad():
        assert vae.encode(torch.zeros(1, 3, FRAMES, SIZE, SIZE)).shape[2:] == GRID


def test_a_row_does_not_depend_on_the_others_and_no_split_has_anothers():
    rows, again = clips.clip_rows("val", 3, 4), clips.clip_rows("val", 0, 7)
    assert all(torch.equal(rows[key], again[key][3:]) for key in rows)
    assert torch.equal(again["person"], world.people("val", 7))
    other = clips.clip_rows("train", 0, 7)
    assert not torch.equal(again["setting"], other["setting"])
    assert not torch.equal(again["action"], other["action"])


def test_the_caption_of_a_row_names_what_it_shows_and_stands_at_its_number():
    rows = clips.clip_rows("test", 0, 20)
    captions, known = clips.captions_of(rows), world.all_captions()
    assert captions[-1] == "" and len(captions) == 21
    numbers = clips.caption_number(rows["told"], rows["template"])
    assert [known[n] for n in numbers] == captions[:-1]
    many = clips.clip_rows("train", 0, 400)
    whole = torch.cat([many["setting"], many["action"][:, None]], dim=1)
    said = many["told"] == whole
    assert (many["told"][~said] == clips.past_the_end().expand_as(whole)[~said]).all()
    assert (0.75 < said.float().mean(dim=0)).all() and (said.float().mean(dim=0) < 0.85).all()


def test_a_batch_has_the_caption_of_each_clip_and_another_picture_of_its_person():
    rows = {key: value[[0, 1, 0]] for key, value in clips.clip_rows("val", 4, 2).items()}
    data, captions = kept(rows), clips.captions_of(rows)
    assert len(data.kept) == 1 and data.null_context.item() == 0
    batch = data.batch([2, 1], [seeded(1), seeded(2)])
    assert batch.index == [2, 1] and batch.x0.flatten().tolist() == [2, 1]
    assert batch.face.flatten().tolist() == [2, 1] and batch.boxes[:, 0, 0].tolist() == [2, 1]
    assert batch.context.flatten().tolist() == [len(captions[2]), len(captions[1])]
    data.batch([0, 2], [seeded(1), seeded(2)])
    assert len(data.kept) == 3, "each distinct caption once, and the null prompt"
    for k, i in enumerate(batch.index):
        expected, box = world.draw_references(rows["person"][[i]], rows["setting"][[i]],
                                              seeded(k + 1), SIZE)
        assert torch.equal(batch.reference[k], expected[0])
        assert torch.equal(batch.reference_box[k], box[0])
    data.same_setting = 0.0
    batch = data.batch([0], [seeded(1)])
    expected, _ = world.draw_references(rows["person"][[0]], rows["setting"][[0]], seeded(1), SIZE,
                                        share=0.0)
    assert torch.equal(batch.reference[0], expected[0])
    assert batch.seen.all() and batch.reference_seen.all()


def test_a_fresh_clip_depends_on_its_own_generator_alone_and_carries_its_caption(vae):
    data = clips.FreshClips(vae)
    together = data.clips([0, 1, 2], [seeded(3, k) for k in range(3)])
    alone = data.clips([7], [seeded(3, 1)])
    for name, values in together.items():
        assert torch.allclose(values[1].float(), alone[name][0].float(), atol=0.05), name  # bf16
    exact = clips.FreshClips(vae, "fp32").clips([7], [seeded(3, 1)])["x0"]
    assert 1e-4 < (alone["x0"] - exact).abs().mean() < 0.03, "bf16 unless float32 is asked for"
    assert together["x0"].shape[:2] == together["face"].shape == (3, prod(GRID))
    assert len({tuple(person.tolist()) for person in together["person"]}) == 3
    seen = 0
    for number, setting in zip(together["caption"], together["setting"], strict=True):
        shirts = [f"{name} shirt" for name in world.SHIRTS]
        for table, index in zip((world.SCENES, world.LIGHTS, shirts), setting, strict=True):
            said = [name for name in table if name in data.captions[number]]
            assert said in ([], [list(table)[index]]), "nothing else than what is shown"
            seen += len(said)
    assert seen > 4
    at_once = data.clips([0, 1, 2], seeded(3))
    assert {k: v.shape for k, v in at_once.items()} == {k: v.shape for k, v in together.items()}
    assert len({tuple(person.tolist()) for person in at_once["person"]}) == 3


def test_a_cpu_that_has_kept_no_clips_renders_them_and_says_so(vae, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clips.TextEncoder, "load", lambda *_: FakeText())
    monkeypatch.setattr(clips, "CLIPS", 16)
    train, shown = clips.open_world(Path("x"), Path("y"), vae, "cpu", "bf16")
    assert isinstance(train, clips.FreshClips) and capsys.readouterr().out.count("\n") == 1
    assert train.batch([5], [seeded(0)]).x0.isfinite().all()
    assert torch.equal(shown.rows["person"], world.people("val", 16))
    video = clips.render_clips(clips.clip_rows("val", 0, 16), seeded(5))[0]
    with torch.no_grad():
        exact = patchify(vae.encode(video)).numpy()
    assert 1e-4 < np.abs(shown.latents - exact).mean() < 0.03, "bf16; a latent is about 1"
    same = clips.validation_world(vae, 16, "cpu", "fp32").latents
    assert np.abs(same - exact).max() < 1e-4, "of these pictures"
    with pytest.raises(ValueError, match="expected latents in data/train.*pretrain render"):
        clips.cached_world(vae)
    folder = tmp_path / "data" / "train"
    folder.mkdir(parents=True)
    pictures = world.to_uint8(video).permute(0, 2, 3, 4, 1).numpy()
    for name, numbers in (("faces", shown.faces), ("boxes", shown.boxes), ("video", pictures),
                          ("latents", shown.latents + 0.2)):
        np.save(folder / f"{name}.npy", numbers)
    with pytest.raises(ValueError, match="latents of this checkpoint's VAE .* are 0.20 away; run"):
        clips.open_world(Path("x"), Path("y"), vae, "cpu", "bf16")
    np.save(folder / "latents.npy", shown.latents)
    again, _ = clips.open_world(Path("x"), Path("y"), vae, "cpu", "bf16", quiet=True)
    assert isinstance(again, clips.KeptClips) and again.fingerprint() != train.fingerprint()
    assert torch.equal(again.rows["person"], world.people("train", 16)), "not those it is shown on"
    assert capsys.readouterr().out == ""


def test_the_flag_says_how_many_references_show_their_clips_setting(monkeypatch):
    both = SimpleNamespace(), SimpleNamespace()
    monkeypatch.setattr(clips, "open_world", lambda *_, **__: both)
    args = SimpleNamespace(manifest=None, same_setting=0.25, checkpoint="", gemma_root="",
                           precision="fp32")
    train, shown, held_out = clips.open_data(args, None, "cpu")
    assert (train, shown, held_out) == (*both, True)
    assert train.same_setting == 0.25 and not hasattr(shown, "same_setting")
