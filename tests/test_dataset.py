"""What a step reads is a function of its number: which clips, what is random, where the faces are.

`Order` takes every clip once per epoch, `shard_indices` deals a step out without gaps or repeats,
`draw` and `RealClips` treat each clip by itself, and boxes, masks and landmarks stand where the
faces stand, in the clip and on the reference.

Hardware: CPU, seconds. Run: python -m pytest tests/test_dataset.py
"""

import json
from argparse import Namespace
from collections import Counter
from dataclasses import fields, replace

import clipfiles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageColor, ImageDraw
from tiny import write_tiny

import train
from clips.cache import CachedLatents
from clips.dataset import Batch, Order, RealClips, check_batch, open_manifest, shard_indices
from clips.frames import load_clip, parse_buckets
from clips.manifest import check
from common.seeds import seeded
from losses import IDENTITY_MAX_SIGMA, pool_face_mask
from ltx.vae import VideoVAE
from reference import letterbox, patchify

# ------------------------------------------------------------ which clips


@st.composite
def groups(draw):
    """A few groups of clips, numbered through, as the buckets of a manifest are; some are empty."""
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any))
    numbers = iter(draw(st.permutations(range(sum(sizes)))))
    return [[next(numbers) for _ in range(size)] for size in sizes]


@settings(max_examples=60, deadline=None)
@given(groups=groups(), size=st.integers(1, 7), seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_an_epoch_takes_every_clip_at_most_once_and_leaves_less_than_a_batch(groups, size, seed,
                                                                             epoch):
    order = Order(groups, size, seed)
    batches = [order(epoch * order.per_epoch + k) for k in range(order.per_epoch)]
    where = {clip: g for g, group in enumerate(groups) for clip in group}
    seen, count = Counter(), Counter()
    for batch in batches:
        assert len(batch) == size and len({where[clip] for clip in batch}) == 1, "one shape"
        seen.update(batch)
        count[where[batch[0]]] += 1
    for g, group in enumerate(groups):
        if len(group) >= size:
            assert count[g] == len(group) // size
            assert all(seen[clip] <= 1 for clip in group), "no clip twice in an epoch"
            assert sum(seen[clip] for clip in group) == len(group) - len(group) % size
        elif group:
            assert count[g] == 1, "a small group is repeated to fill one batch"
            times = {seen[clip] for clip in group}
            assert times <= {size // len(group), -(-size // len(group))}, "evenly"
    again = Order(groups, size, seed)
    backwards = [again(epoch * order.per_epoch + k) for k in reversed(range(order.per_epoch))]
    assert backwards[::-1] == batches, "a step's clips do not depend on the steps before"


def test_another_epoch_or_seed_has_another_order_and_what_was_left_out_comes_later():
    order = Order([range(10), range(10, 17)], 3, seed=4)
    epochs = [[order(e * order.per_epoch + k) for k in range(order.per_epoch)] for e in range(8)]
    assert order.per_epoch == 5 and len({str(epoch) for epoch in epochs}) == 8
    assert {clip for epoch in epochs for batch in epoch for clip in batch} == set(range(17))
    kinds = {tuple(batch[0] < 10 for batch in epoch) for epoch in epochs}
    assert len(kinds) > 1, "the groups' batches are mixed"
    other = Order([range(10), range(10, 17)], 3, seed=5)
    assert [other(k) for k in range(5)] != epochs[0]
    with pytest.raises(ValueError, match="expected clips.*clips.manifest check"):
        Order([[], []], 2, 0)


@settings(max_examples=40, deadline=None)
@given(world=st.integers(1, 5), size=st.integers(1, 4), accumulate=st.integers(1, 4))
def test_the_shares_of_all_processes_are_a_partition_of_the_step(world, size, accumulate):
    indices = [100 + k for k in range(world * size * accumulate)]
    shares = [shard_indices(indices, rank, world, size) for rank in range(world)]
    assert sorted(pair for part in shares for pair in part) == list(enumerate(indices))
    for part in shares:  # what is computed together stands together in the step
        assert len(part) == size * accumulate
        starts = [place for place, _ in part[::size]]
        assert all(place % size == 0 for place in starts)


# ------------------------------------------------------------ what is random about a clip

RECIPE = Namespace(drop_ref=0.10, drop_both=0.05, drop_text=0.05, w_id=0.1, augment_color=1.0,
                   augment_pose=1.0, augment_layout=1.0, id_sigma=0.5, noise_ref=0.0)


def made_up(B: int, L: int = 6, C: int = 4, F: int = 5, side: int = 16) -> Batch:
    """A batch of numbers; two frames of every clip have no known face."""
    seen = torch.ones(B, F, dtype=torch.bool)
    seen[:, 1:3] = False
    return Batch(index=list(range(B)), grid=(L, 1, 1), frame_rate=8.0, x0=torch.randn(B, L, C),
                 context=torch.randn(B, 3, 8), face=torch.rand(B, L), boxes=torch.rand(B, F, 4),
                 landmarks=torch.full((B, F, 5, 2), torch.nan), seen=seen,
                 reference=torch.rand(B, 3, side, side) * 2 - 1, reference_box=torch.rand(B, 4),
                 reference_landmarks=torch.full((B, 5, 2), torch.nan),
                 reference_seen=torch.ones(B, dtype=torch.bool))


def test_a_clips_draws_do_not_depend_on_the_others_in_its_batch():
    batch = made_up(4)
    together = train.draw(RECIPE, batch, [seeded(0, 7, place) for place in range(4)])
    for place in range(4):
        alone = train.draw(RECIPE, batch.part(place, place + 1), [seeded(0, 7, place)])
        for field in fields(alone):
            a, b = (getattr(x, field.name) for x in (alone, together.part(place, place + 1)))
            assert torch.equal(a, b), f"{field.name} of place {place}"
    other = train.draw(RECIPE, batch, [seeded(0, 8, place) for place in range(4)])
    assert not torch.equal(other.noise, together.noise)
    assert not torch.equal(other.reference, together.reference)


@pytest.fixture(scope="module")
def many():
    """3000 clips of one token, nothing augmented: (batch, draws)."""
    batch = made_up(3000, L=1, C=1, side=2)
    plain = Namespace(**{k: 0.0 if k.startswith("augment") else v for k, v in vars(RECIPE).items()})
    return batch, train.draw(plain, batch, [seeded(3, k) for k in range(3000)])


def test_conditions_are_dropped_in_the_asked_shares(many):
    """Tolerance: four standard deviations of a share among 3000."""
    _, draws = many
    ref, text = draws.keep_ref, draws.keep_text
    shares = {"both": (~ref & ~text, 0.05), "reference alone": (~ref & text, 0.10),
              "text alone": (ref & ~text, 0.05), "nothing": (ref & text, 0.80)}
    for name, (dropped, asked) in shares.items():
        found = dropped.float().mean().item()
        assert abs(found - asked) < 4 * (asked * (1 - asked) / 3000) ** 0.5, (name, found)
    with_ref, without = (draws.sigma[keep].mean().item() for keep in (ref, ~ref))
    assert abs(with_ref - without) < 0.05, "what is dropped does not depend on the noise"


def test_identity_counts_at_low_noise_with_the_reference_and_where_both_faces_are_known(many):
    batch, draws = many
    judged = draws.frame >= 0
    assert torch.equal(judged, (draws.sigma <= IDENTITY_MAX_SIGMA) & draws.keep_ref)
    assert 150 < judged.sum() < 2850, "both cases occur"
    found = draws.frame[judged].bincount(minlength=5)
    assert found[1] == found[2] == 0, "no face is known there"
    equal = found[[0, 3, 4]] / judged.sum() - 1 / 3
    assert equal.abs().max() < 0.07, f"frames in equal shares: {found.tolist()}"
    B = 80
    assert judged[:B].any()
    few, generators = batch.part(0, B), [[seeded(3, k) for k in range(B)] for _ in range(3)]
    no_face = replace(few, seen=torch.zeros_like(few.seen))
    no_face_on_reference = replace(few, reference_seen=torch.zeros(B, dtype=torch.bool))
    off = Namespace(**vars(RECIPE) | {"w_id": 0.0})
    cases = ((RECIPE, no_face), (RECIPE, no_face_on_reference), (off, few))
    for (recipe, part), fresh in zip(cases, generators, strict=True):
        assert (train.draw(recipe, part, fresh).frame == -1).all()


def test_a_batch_that_is_not_finite_is_refused_with_step_and_clips():
    for field, what in (("x0", "latents"), ("context", "contexts"),
                        ("reference", "pixels of the reference")):
        batch = made_up(3)
        getattr(batch, field)[1].flatten()[2] = torch.nan
        source = Namespace(names=lambda bad: f"clips {bad}")
        with pytest.raises(ValueError, match=rf"finite {what}, got .* step 9, clips \[1\]; "):
            check_batch(9, batch, source)
    check_batch(9, made_up(3), source)


# ------------------------------------------------------------ clips of files

MARKED, BARE, NO_FACE = range(3)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """(clips, vae): two videos of a moving square, one with landmarks, and one of a pattern."""
    folder = tmp_path_factory.mktemp("real")
    write_tiny(folder)
    rows = []
    for name in ("marked", "bare", "none"):
        draw = clipfiles.draw_moving if name == "none" else clipfiles.draw_square
        clipfiles.write(folder / f"{name}.mp4", 20, size=(64, 96), draw=draw)
        rows.append({"video": f"{name}.mp4", "caption": f"the {name} one", "identity": "square"})
        if name != "none":
            rows[-1]["faces"] = f"{name}.json"
            clipfiles.faces_file(folder / rows[-1]["faces"], range(20), (64, 96),
                                 marks=name == "marked")
    args = Namespace(buckets="64x96x9", frame_rate=24.0, root=[], allow_outside=False,
                     checkpoint=folder / "model.safetensors", gemma_root=folder / "gemma",
                     offload_text="none", cache=folder / "cache")
    vae = VideoVAE.load(args.checkpoint, dtype=torch.float32)
    return open_manifest(clipfiles.manifest(folder, *rows), args, vae, "cpu"), vae


def test_latents_boxes_landmarks_and_masks_of_a_batch_are_those_of_its_files(real):
    clips, vae = real
    indices = [NO_FACE, MARKED, BARE]
    batch = clips.batch(indices, [seeded(1, i) for i in indices])
    assert batch.index == indices and batch.grid == (3, 8, 12) and batch.frame_rate == 24
    for k, i in enumerate(indices):
        video = load_clip(clips.rows[i].video, clips.rows[i].bucket, 24.0, 0.0)
        with torch.no_grad():
            assert (batch.x0[k] - patchify(vae.encode(video[None]))[0]).abs().max() < 1e-4
        drawn = torch.zeros(9, 64, 96)
        for n in range(9) if i != NO_FACE else ():
            x0, y0, x1, y1 = clipfiles.face_box(n)
            drawn[n, y0:y1, x0:x1] = 1
            assert (batch.boxes[k, n] - torch.tensor([x0, y0, x1, y1])).abs().max() < 0.01
        assert (batch.seen[k] == (i != NO_FACE)).all()
        assert torch.equal(batch.face[k], pool_face_mask(drawn[None], 4, 8)[0])
        assert batch.landmarks[k].isnan().all() == (i != MARKED)
    nose = (batch.boxes[1, :, :2] + batch.boxes[1, :, 2:]) / 2
    assert (batch.landmarks[1, :, 2] - nose).abs().max() < 0.01
    context = clips.contexts["the marked one"]()
    assert torch.equal(batch.context[1], context) and not torch.equal(batch.context[0], context)


def test_faces_of_a_clip_that_starts_later_are_those_of_its_own_moments(real):
    clips = real[0]
    later = [replace(clips.rows[MARKED], start=0.25)]
    boxes = RealClips(CachedLatents(later, []), clips.contexts, 4, 8).faces(0)[0]
    assert (boxes[0] - torch.tensor(clipfiles.face_box(6))).abs().max() < 0.01


def test_a_clip_of_a_batch_does_not_depend_on_its_neighbours(real):
    clips, indices = real[0], [MARKED, BARE, NO_FACE]
    together = clips.batch(indices, [seeded(2, i) for i in indices])
    for k, i in enumerate(indices):
        alone = clips.batch([i], [seeded(2, i)])
        for field in fields(alone):
            a, b = (getattr(x, field.name) for x in (alone, together.part(k, k + 1)))
            same = torch.equal(a.nan_to_num(9), b.nan_to_num(9)) if torch.is_tensor(a) else a == b
            assert same, field.name


def test_the_fingerprint_changes_with_what_decides_a_step_and_not_with_where_it_lies(real,
                                                                                     tmp_path):
    clips = real[0]
    for name, content in (("x.png", "one"), ("y.png", "one"), ("z.png", "two")):
        (tmp_path / name).write_text(content)
    x, y, z = (tmp_path / name for name in ("x.png", "y.png", "z.png"))

    def told(**change) -> str:
        latents = CachedLatents([replace(clips.rows[0], **change), *clips.rows[1:]],
                                clips.latents.paths)
        return RealClips(latents, clips.contexts, 4, 8).fingerprint()

    marks = [told(), told(caption="else"), told(identity="nobody"), told(faces=None),
             told(reference=x), told(reference=z), told(faces=x), told(faces=z)]
    assert marks[0] == clips.fingerprint() and len(set(marks)) == len(marks)
    assert told(reference=y) == told(reference=x) and told(faces=y) == told(faces=x)


# ------------------------------------------------------------ the face on the reference


@pytest.mark.parametrize("size", [(640, 320), (320, 640)], ids=["wide", "tall"])
def test_box_and_landmarks_of_a_reference_land_on_its_face_on_the_canvas(tmp_path, size):
    """Five coloured spots, four at the corners of the box, found again on the canvas: one pixel."""
    left, top, side = size[0] // 2 + 20, size[1] // 4, 100
    spots = {"red": (0, 0), "lime": (side, 0), "blue": (50, 50), "magenta": (0, side),
             "cyan": (side, side)}
    spots = {name: (left + x, top + y) for name, (x, y) in spots.items()}
    picture = Image.new("RGB", size, "black")
    for name, (x, y) in spots.items():
        ImageDraw.Draw(picture).rectangle([x - 10, y - 10, x + 9, y + 9], fill=name)
    picture.save(tmp_path / "picture.png")
    face = {"box": [left, top, left + side, top + side], "landmarks": list(spots.values())}
    told = {"frame_rate": 8, "size": [size[1], size[0]], "frames": [{"t": 0.0, **face}]}
    told["reference"] = {"size": told["size"], **face}
    (tmp_path / "faces.json").write_text(json.dumps(told))
    path = clipfiles.manifest(tmp_path, {"video": "picture.png", "caption": "five spots",
                                         "reference": "picture.png", "faces": "faces.json"})
    report = check(path, parse_buckets("64x96x1", 4, 8), 8.0)
    clips = RealClips(CachedLatents(report.used, [path]), {"": lambda: torch.zeros(1, 4)}, 4, 8)
    canvas, box, marks, seen = clips.reference(0, seeded(0))
    assert seen and torch.equal(canvas, letterbox(picture, 64, 96))
    for mark, name in zip(marks, spots, strict=True):
        rgb = torch.tensor(ImageColor.getrgb(name))[:, None, None] / 127.5 - 1
        weight = (1 - (canvas - rgb).abs().amax(0)).clamp(min=0)           # (h, w)
        x = (weight.sum(0) * (torch.arange(96) + 0.5)).sum() / weight.sum()
        y = (weight.sum(1) * (torch.arange(64) + 0.5)).sum() / weight.sum()
        assert (mark - torch.stack([x, y])).abs().max() <= 1, (name, mark, (x, y))
    assert (box - torch.cat([marks[0], marks[4]])).abs().max() < 1e-3
