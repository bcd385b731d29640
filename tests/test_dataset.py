"""What a step reads is a function of its number: which clips, what is random about each, and where the faces are.

`Order` takes every clip once per epoch, `share` deals a step out without gaps or repeats, `draw` and `RealClips` treat
each clip by itself, and boxes, masks and landmarks stand where the faces stand, in the clip and on the reference.

Hardware: CPU, seconds. Run: python -m pytest tests/test_dataset.py
"""

import json
from argparse import Namespace
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from test_recipe import CLIPS, LARGE, PEOPLE, SEED, bench, parsed, words  # noqa: F401  (bench is a fixture)

import train
from bench.clip_world import plan_clips
from clips.cache import CachedLatents
from clips.dataset import (
    Batch,
    Order,
    RealClips,
    captions_of,
    clip_rows,
    open_manifest,
    shard_indices,
)
from clips.frames import parse_buckets
from clips.manifest import box_mask, check, draw_reference
from common.seeds import seeded
from losses import IDENTITY_MAX_SIGMA, pool_face_mask
from reference import letterbox, patchify

# ------------------------------------------------------------ which clips


@st.composite
def groups(draw):
    """A few groups of clips, numbered through, as the buckets of a manifest are; some may be empty."""
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any))
    numbers = iter(draw(st.permutations(range(sum(sizes)))))
    return [[next(numbers) for _ in range(size)] for size in sizes]


@settings(max_examples=150, deadline=None)
@given(groups=groups(), size=st.integers(1, 7), seed=st.integers(0, 99), epoch=st.integers(0, 3))
def test_an_epoch_takes_every_clip_at_most_once_and_leaves_less_than_a_batch_of_each_group(groups, size, seed, epoch):
    order = Order(groups, size, seed)
    batches = [order(epoch * order.per_epoch + k) for k in range(order.per_epoch)]
    where = {clip: g for g, group in enumerate(groups) for clip in group}
    seen, count = Counter(), Counter()
    for batch in batches:
        assert len(batch) == size
        assert len({where[clip] for clip in batch}) == 1, "one shape in a batch"
        seen.update(batch)
        count[where[batch[0]]] += 1
    for g, group in enumerate(groups):
        if len(group) >= size:
            assert count[g] == len(group) // size
            assert all(seen[clip] <= 1 for clip in group), "no clip twice in an epoch"
            assert sum(seen[clip] for clip in group) == len(group) - len(group) % size
        elif group:
            assert count[g] == 1, "a small group is repeated to fill one batch"
            assert {seen[clip] for clip in group} <= {size // len(group), -(-size // len(group))}, "evenly"
    again = Order(groups, size, seed)
    backwards = [again(epoch * order.per_epoch + k) for k in reversed(range(order.per_epoch))]
    assert backwards[::-1] == batches, "a step's clips do not depend on the steps before"


def test_another_epoch_and_another_seed_have_another_order_and_what_was_left_out_comes_later():
    order = Order([range(10), range(10, 17)], 3, seed=4)
    epochs = [[order(e * order.per_epoch + k) for k in range(order.per_epoch)] for e in range(8)]
    assert order.per_epoch == 5 and len({str(epoch) for epoch in epochs}) == 8
    assert {clip for epoch in epochs for batch in epoch for clip in batch} == set(range(17))
    kinds = {tuple(batch[0] < 10 for batch in epoch) for epoch in epochs}
    assert len(kinds) > 1, "the groups' batches are mixed"
    other = Order([range(10), range(10, 17)], 3, seed=5)
    assert [other(k) for k in range(5)] != epochs[0]


def test_an_order_without_clips_is_refused_with_advice():
    with pytest.raises(ValueError, match="expected clips.*clips.py check"):
        Order([[], []], 2, 0)


@settings(max_examples=100, deadline=None)
@given(world=st.integers(1, 5), size=st.integers(1, 4), accumulate=st.integers(1, 4))
def test_the_shares_of_all_processes_are_a_partition_of_the_step(world, size, accumulate):
    indices = [100 + k for k in range(world * size * accumulate)]
    shares = [shard_indices(indices, rank, world, size) for rank in range(world)]
    assert all(len(part) == size * accumulate for part in shares)
    assert sorted(pair for part in shares for pair in part) == list(enumerate(indices))


# ------------------------------------------------------------ what is random about a clip

RECIPE = Namespace(drop_ref=0.10, drop_both=0.05, drop_text=0.05, w_id=0.1, augment_color=1.0, augment_pose=1.0,
                   augment_layout=1.0)


def made_up(B: int, L: int = 6, C: int = 4, F: int = 5, side: int = 16) -> Batch:
    """A batch of numbers; two frames of every clip have no known face."""
    seen = torch.ones(B, F, dtype=torch.bool)
    seen[:, 1:3] = False
    return Batch(index=list(range(B)), grid=(L, 1, 1), frame_rate=8.0, x0=torch.randn(B, L, C),
                 context=torch.randn(B, 3, 8), face=torch.rand(B, L), boxes=torch.rand(B, F, 4),
                 landmarks=torch.full((B, F, 5, 2), torch.nan), seen=seen,
                 reference=torch.rand(B, 3, side, side) * 2 - 1,
                 reference_box=torch.rand(B, 4), reference_landmarks=torch.full((B, 5, 2), torch.nan),
                 reference_seen=torch.ones(B, dtype=torch.bool))


def test_a_clips_draws_do_not_depend_on_the_others_in_its_batch():
    batch = made_up(4)
    together = train.draw(RECIPE, batch, [seeded(0, 7, place) for place in range(4)])
    for place in range(4):
        alone = train.draw(RECIPE, batch.part(place, place + 1), [seeded(0, 7, place)])
        for field in fields(alone):
            a, b = getattr(alone, field.name), getattr(together.part(place, place + 1), field.name)
            assert torch.equal(a, b), f"{field.name} of place {place}"
    other = train.draw(RECIPE, batch, [seeded(0, 8, place) for place in range(4)])
    assert not torch.equal(other.noise, together.noise) and not torch.equal(other.reference, together.reference)


@pytest.fixture(scope="module")
def many():
    """4000 clips of one token, nothing augmented: (batch, draws)."""
    batch = made_up(4000, L=1, C=1, side=2)
    plain = Namespace(**vars(RECIPE) | dict.fromkeys(("augment_color", "augment_pose", "augment_layout"), 0.0))
    return batch, train.draw(plain, batch, [seeded(3, k) for k in range(4000)])


def test_conditions_are_dropped_in_the_asked_shares(many):
    """Tolerance: four standard deviations of a share among 4000."""
    _, draws = many
    shares = {"both": ~draws.keep_ref & ~draws.keep_text, "reference alone": ~draws.keep_ref & draws.keep_text,
              "text alone": draws.keep_ref & ~draws.keep_text, "nothing": draws.keep_ref & draws.keep_text}
    for (name, dropped), asked in zip(shares.items(), (0.05, 0.10, 0.05, 0.80), strict=True):
        found = dropped.float().mean().item()
        print(f"{name}: {found:.4f}, asked {asked}")
        assert abs(found - asked) < 4 * (asked * (1 - asked) / 4000) ** 0.5, (name, found)
    low, high = (draws.sigma[keep].mean().item() for keep in (draws.keep_ref, ~draws.keep_ref))
    assert abs(low - high) < 0.04, "what is dropped does not depend on the noise"


def test_identity_is_judged_only_at_low_noise_with_the_reference_and_on_a_frame_with_a_known_face(many):
    batch, draws = many
    judged = draws.frame >= 0
    assert torch.equal(judged, (draws.sigma <= IDENTITY_MAX_SIGMA) & draws.keep_ref)
    assert 200 < judged.sum() < 3800, "both cases occur"
    assert batch.seen[judged, draws.frame[judged]].all()
    found = draws.frame[judged].bincount(minlength=5)
    assert found[1] == found[2] == 0
    assert (found[[0, 3, 4]] / judged.sum() - 1 / 3).abs().max() < 0.06, f"frames in equal shares: {found.tolist()}"


@pytest.mark.parametrize("without", ["a face on the reference", "a face in the clip", "a weight"])
def test_identity_is_never_judged(many, without):
    batch, draws = many
    B = 400
    batch, generators, recipe = batch.part(0, B), [seeded(3, k) for k in range(B)], Namespace(**vars(RECIPE))
    if without == "a weight":
        recipe.w_id = 0.0
    elif without == "a face in the clip":
        batch = replace(batch, seen=torch.zeros_like(batch.seen))
    else:
        batch = replace(batch, reference_seen=torch.zeros(B, dtype=torch.bool))
    assert (train.draw(recipe, batch, generators).frame == -1).all() and (draws.frame[:B] >= 0).any()


# ------------------------------------------------------------ clips of files


@pytest.fixture(scope="module")
def real(bench):  # noqa: F811
    """The clips of the bench through the cache, as train.py opens them."""
    args = parsed(words(bench, bench / "unused", buckets=LARGE))
    vae = train.load_vae(args.checkpoint)
    return open_manifest(args.manifest, args, vae, "cpu"), vae


def test_boxes_masks_and_latents_of_a_batch_are_those_of_the_clips_that_were_rendered(real, bench):  # noqa: F811
    """Boxes within 1.5 pixels (a file of another rate has its frames up to half a frame beside the moment); the mask is
    that of the boxes, within a quarter of a token; the latent is nearest to its own clip's, encoded directly."""
    clips, vae = real
    direct = load_file(bench / "clips" / "direct.safetensors")
    assert sorted(len(group) for group in clips.groups) == [2, CLIPS - 2], "clips 3 and 10 have one frame"
    worst = {"boxes": 0.0, "mask": 0.0}
    for group in clips.groups:
        batch = clips.batch(group, [seeded(1, i) for i in group])
        assert batch.index == list(group) and batch.seen.all() and batch.context.shape[0] == len(group)
        for k, i in enumerate(group):
            expected = direct[f"{clips.rows[i].number}.boxes"]
            worst["boxes"] = max(worst["boxes"], (batch.boxes[k] - expected).abs().max().item())
            mask = pool_face_mask(box_mask(expected, batch.seen[k], 64, 64)[None], vae.time_scale, vae.space_scale)[0]
            worst["mask"] = max(worst["mask"], (batch.face[k] - mask).abs().max().item())
            assert 0.5 * mask.sum() < batch.face[k].sum() < 2 * mask.sum()
        assert batch.face.shape == batch.x0.shape[:2]
        side = 64 // vae.space_scale
        assert batch.grid == ((batch.boxes.shape[1] - 1) // vae.time_scale + 1, side, side)
    print(worst)
    assert worst["boxes"] <= 1.5 and worst["mask"] <= 0.25, worst
    group = clips.groups[0]
    pictures = torch.stack([direct[f"{clips.rows[i].number}.video"].permute(3, 0, 1, 2) for i in group])
    with torch.no_grad():
        again = patchify(vae.encode(pictures.float() / 127.5 - 1)).flatten(1)
    x0 = clips.batch(group, [seeded(1)] * len(group)).x0.flatten(1)
    distance = torch.cdist(x0, again) / again.norm(dim=1)                                 # (clips, clips)
    others = distance + torch.eye(len(group)) * 9
    print(f"latents: own at most {distance.diag().max():.3f}, another at least {others.min():.3f}")
    assert (distance.diag() < 0.5 * others.min(dim=1).values).all(), "each latent is that of its own clip"


def test_a_clip_of_a_batch_does_not_depend_on_its_neighbours(real):
    clips, _ = real
    group = clips.groups[0][:3]
    together = clips.batch(group, [seeded(2, i) for i in group])
    for k, i in enumerate(group):
        alone = clips.batch([i], [seeded(2, i)])
        for field in fields(alone):
            a, b = getattr(alone, field.name), getattr(together.part(k, k + 1), field.name)
            assert torch.equal(a.nan_to_num(9), b.nan_to_num(9)) if isinstance(a, torch.Tensor) else a == b, field.name


def test_landmarks_are_known_where_the_faces_file_has_them_and_nan_elsewhere(real):
    clips, _ = real
    plan = plan_clips(PEOPLE, CLIPS, SEED)
    for i, clip in enumerate(plan):
        boxes, marks, seen = clips.faces(i)
        assert marks.isnan().all() == (not clip.marked) and seen.all()
        if clip.marked:
            assert (marks >= boxes[:, None, :2]).all() and (marks <= boxes[:, None, 2:]).all()


COLOURS = ["red", "lime", "blue", "magenta", "cyan"]


@pytest.mark.parametrize("size", [(640, 320), (320, 640), (400, 400), (500, 384)], ids=str)
def test_box_and_landmarks_of_a_reference_land_on_its_face_on_the_canvas(tmp_path, size):
    """A black square with five coloured spots, found again on the letterboxed canvas by its colours: one pixel."""
    left, top, side = size[0] // 2 + 20, size[1] // 8, 120
    spots = [(left + x, top + y) for x, y in ((25, 30), (95, 30), (60, 60), (30, 95), (90, 95))]
    picture = Image.new("RGB", size, "yellow")
    pen = ImageDraw.Draw(picture)
    pen.rectangle([left, top, left + side - 1, top + side - 1], fill="black")
    for (x, y), colour in zip(spots, COLOURS, strict=True):
        pen.rectangle([x - 10, y - 10, x + 9, y + 9], fill=colour)  # its middle is the corner (x, y)
    picture.save(tmp_path / "picture.png")
    face = {"size": [size[1], size[0]], "box": [left, top, left + side, top + side], "landmarks": spots}
    clip = {"t": 0.0, "box": face["box"], "landmarks": spots}
    (tmp_path / "faces.json").write_text(json.dumps(
        {"frame_rate": 8, "size": face["size"], "frames": [clip], "reference": face}))
    (tmp_path / "manifest.jsonl").write_text(json.dumps(
        {"video": "picture.png", "caption": "a square", "reference": "picture.png", "faces": "faces.json"}))
    report = check(tmp_path / "manifest.jsonl", parse_buckets("64x96x1", 4, 8), 8.0)
    clips = RealClips(CachedLatents(report.used, [None]), {"": lambda: torch.zeros(1, 4)}, 4, 8)
    canvas, box, marks, seen = clips.reference(0, seeded(0))
    assert seen and torch.equal(canvas, letterbox(picture, 64, 96))
    rgb = torch.tensor([rgb_of(colour) for colour in COLOURS])                            # (5, 3) in 0..1
    image = (canvas + 1) / 2
    inside = (image - torch.tensor(rgb_of("yellow"))[:, None, None]).abs().amax(0) > 0.5
    inside &= image.amin(0) < 0.5  # the pad is white
    rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
    found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert (box - found).abs().max() <= 1, (box, found)
    for k, colour in enumerate(rgb):
        weight = (1 - (image - colour[:, None, None]).abs().amax(0) * 2).clamp(min=0)     # (h, w)
        x = (weight.sum(0) * (torch.arange(96) + 0.5)).sum() / weight.sum()
        y = (weight.sum(1) * (torch.arange(64) + 0.5)).sum() / weight.sum()
        assert (marks[k] - torch.stack([x, y])).abs().max() <= 1, (COLOURS[k], marks[k], (x, y))


def rgb_of(colour: str) -> tuple[float, ...]:
    return tuple(v / 255 for v in Image.new("RGB", (1, 1), colour).getpixel((0, 0)))


def test_a_reference_from_another_clip_has_the_face_where_the_box_says(real, bench):  # noqa: F811
    """The box is painted on the drawn frame, and what changes on the canvas is measured there: within 1.5 pixels."""
    clips, _ = real
    wide = [i for i, row in enumerate(clips.rows) if row.found.height != row.found.width]
    assert len(wide) >= 3
    for i in range(len(clips.rows)):
        canvas, box, _, seen = clips.reference(i, seeded(4, i))
        drawn = draw_reference(clips.rows, i, seeded(4, i))
        w, h = drawn.picture.size
        marked = drawn.picture.copy()
        ImageDraw.Draw(marked).rectangle([round(v) for v in drawn.box.tolist()], fill=(255, 0, 255))
        changed = (letterbox(marked, 64, 64) - letterbox(drawn.picture, 64, 64)).abs().amax(0) > 0.4
        rows, columns = changed.any(1).nonzero()[:, 0], changed.any(0).nonzero()[:, 0]
        found = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert seen and (box - found).abs().max() <= 1.5, (clips.rows[i].number, box, found)
        assert torch.equal(canvas, letterbox(drawn.picture, 64, 64))


# ------------------------------------------------------------ clips of the world


def test_captions_of_rows_name_who_does_what_where():
    rows = clip_rows("val", 3, 4)
    assert len(captions_of(rows)) == 5 and captions_of(rows)[-1] == ""
    again = clip_rows("val", 0, 7)
    assert all(torch.equal(rows[key], again[key][3:]) for key in rows), "a row does not depend on the others"
