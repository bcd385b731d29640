"""The bench of known clips: `check` sorts it as planned, and what is decoded is what was rendered.

What is lost on the way is almost only colour: 4:2:0 halves its resolution, which alone leaves a
64x64 file about 29 dB. So colour must reach 28 dB, and brightness, stored in full, 32 dB (it loses
most where 256 pixels are averaged to 64 while the direct frames were drawn at 64). A slip of one
frame costs any moving clip 4 dB at least.

Hardware: CPU, some seconds. Run: python -m pytest tests/test_clip_world.py
"""

import json
from collections import defaultdict

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bench import clip_world
from bench.clip_world import (
    BROKEN,
    KINDS,
    number_rows,
    plan_clips,
    render_at,
    stored_time,
    write_clips,
)
from clips.face import usable_landmarks
from clips.frames import clip_times, cover, load_clip, parse_buckets
from clips.manifest import box_mask, check, draw_reference, faces_for_clip, load_faces
from toy import world

PEOPLE, CLIPS, SEED = 6, 24, 0
BUCKETS = parse_buckets("64x64x9,64x64x1", time_scale=4, space_scale=8)
BRIGHTNESS = torch.tensor([0.299, 0.587, 0.114])  # BT.601
COLOUR_FLOOR, BRIGHTNESS_FLOOR, SLIP = 28.0, 32.0, 4.0  # dB


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_clips(tmp_path_factory.mktemp("world") / "folder", PEOPLE, CLIPS, SEED)


@pytest.fixture(scope="module")
def report(manifest):
    return check(manifest, BUCKETS, frame_rate=8)


@pytest.fixture(scope="module")
def direct(manifest):
    return load_file(manifest.parent / "direct.safetensors")


@pytest.fixture(scope="module")
def decoded(report):
    """Row number -> the clip as training gets it, (F, 64, 64, 3) in [-1, 1]."""
    return {row.number: load_clip(row.video, row.bucket, 8).permute(1, 2, 3, 0)
            for row in report.used}


def by_row() -> dict:
    """Row number -> planned clip."""
    plan = plan_clips(PEOPLE, CLIPS, SEED)
    return {number: plan[i] for number, i in enumerate(number_rows(CLIPS), 1) if i is not None}


# ------------------------------------------------------------ the folder


def test_check_uses_every_good_row_and_names_the_planned_reason_for_every_broken_one(manifest,
                                                                                     report):
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert len(lines) == CLIPS + len(BROKEN)
    assert [row.number for row in report.used] == list(by_row())
    found = {lines[row.number - 1]["video"]: row.broken.reason for row in report.refused}
    assert found == {name: reason for name, _, reason in BROKEN}
    for row in report.used:
        assert row.bucket.frames == (9 if by_row()[row.number].seconds else 1)
        assert row.caption == by_row()[row.number].caption


def test_files_really_have_the_planned_codecs_rates_sizes_sound_and_turns(report):
    seen = defaultdict(set)
    for row in report.used:
        clip = by_row()[row.number]
        assert (row.found.height, row.found.width) == clip.size
        for stored, planned in zip(row.found.times, clip.times, strict=True):
            assert abs(stored - float(planned)) <= 0.0011  # Matroska rounds to 1 ms
        if row.video.suffix == ".png":
            continue
        seen["suffix"].add(row.video.suffix)
        seen["size"].add(clip.size)
        seen["rate"].add(clip.rate)
        with av.open(str(row.video)) as container:
            stream = container.streams.video[0]
            seen["codec"].add(stream.codec_context.name)
            if container.streams.audio:
                seen["sound"].add(row.video.suffix)
            if clip.kind.sideways:
                seen["turned"].add(next(container.decode(stream)).rotation)
            container.seek(0)
            stamps = [packet.pts for packet in container.demux(stream) if packet.pts is not None]
            if stamps != sorted(stamps):
                seen["out of order"].add(stream.codec_context.name)
    assert seen["codec"] >= {"h264", "hevc", "mpeg4", "mjpeg"} and len(seen["codec"]) >= 5
    assert seen["suffix"] == {"." + kind.suffix for kind in KINDS}
    assert seen["sound"] >= {".mp4", ".mkv"} and seen["turned"] == {-90}
    assert seen["size"] == set(clip_world.SIZES) and seen["rate"] == set(clip_world.RATES)
    assert seen["out of order"] >= {"h264", "hevc", "mpeg4"}


# ------------------------------------------------------------ pictures


def as_clip(pictures) -> torch.Tensor:
    return torch.as_tensor(pictures).float() / 127.5 - 1


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    return -10 * torch.log10(((a - b) / 2).square().mean()).item()


def good(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether every frame of a is that of b within codec noise."""
    frames = zip(a, b, a @ BRIGHTNESS, b @ BRIGHTNESS, strict=True)
    return all(psnr(x, y) >= COLOUR_FLOOR and psnr(p, q) >= BRIGHTNESS_FLOOR
               for x, y, p, q in frames)


def test_the_direct_frames_are_nine_of_an_action_as_the_world_itself_renders_it(direct):
    for number in list(by_row())[:8]:
        clip = by_row()[number]
        generator = torch.Generator().manual_seed(clip.seed)
        poses = world.action_poses(torch.tensor([clip.action]), 25, generator)[:, ::3]  # at 8 fps
        video, boxes, _ = world.render(clip.person[None], clip.setting[None], poses)
        frames = len(clip.direct_times)
        own = world.to_uint8(video[0]).permute(1, 2, 3, 0)[:frames].int()
        assert direct[f"{number}.video"].shape == (frames, 64, 64, 3)
        error = (direct[f"{number}.video"].int() - own).abs().max().item()
        assert error <= 1, f"{error} levels off"  # float32 rounds the moments differently
        assert (direct[f"{number}.boxes"] - boxes[0, :frames]).abs().max() < 1e-3


def test_decoded_clips_are_the_rendered_frames_within_codec_noise_and_a_slip_would_show(decoded,
                                                                                        direct):
    moving = 0
    for number, clip in by_row().items():
        nearest = [stored_time(clip, time) for time in clip.direct_times]
        a, b = decoded[number], as_clip(render_at(clip, nearest, 64, 64)[0])
        assert good(a, b), f"row {number}, {clip.kind.codec}, {clip.size}"
        if clip.rate in (8, 24):  # frames at whole steps of the rate are the direct ones themselves
            assert good(a, as_clip(direct[f"{number}.video"])), f"row {number}"
        if clip.seconds and world.ACTIONS[clip.action] != "stays still":
            moving += 1
            right, late, early = (psnr(x @ BRIGHTNESS, y @ BRIGHTNESS) for x, y in
                                  ((a, b), (a[:-1], b[1:]), (a[1:], b[:-1])))
            assert right > max(late, early) + SLIP, (number, right, late, early)
            assert not good(a[:-1], b[1:]) and not good(a[1:], b[:-1]), "the floors let it pass"
    assert moving > CLIPS // 2


# ------------------------------------------------------------ faces and references


def test_boxes_of_the_faces_files_land_on_the_direct_ones(report, direct):
    for row in report.used:
        crop, clip = cover(row.found.height, row.found.width, row.bucket), by_row()[row.number]
        boxes, marks, valid = faces_for_clip(load_faces(row.faces), row.bucket, crop,
                                             clip_times(row.bucket.frames, 8))
        expected = direct[f"{row.number}.boxes"]
        assert valid.all() and (boxes - expected).abs().max() <= 1.5  # pixels
        mask, wanted = (box_mask(b, valid, 64, 64) for b in (boxes, expected))
        for axis in (1, 2):  # rows, then columns that the mask covers
            off = (mask.amax(axis).sum(1) - wanted.amax(axis).sum(1)).abs().max().item()
            assert off <= 2, f"{off} pixels"
        assert (marks is not None) == clip.marked
        if clip.marked:
            assert usable_landmarks(marks).all()
            assert (marks >= boxes[:, None, :2]).all() and (marks <= boxes[:, None, 2:]).all()


def test_references_come_from_where_each_row_says_and_an_own_one_shows_the_person(report):
    g, sources = torch.Generator().manual_seed(3), defaultdict(int)
    for i, row in enumerate(report.used):
        clip = by_row()[row.number]
        source = draw_reference(report.used, i, g).source
        others = "other clip" if clip.named else "other moment"
        assert source == ("given" if clip.own_reference else others)
        sources[source] += 1
        if not clip.own_reference:
            continue
        face = json.loads(row.faces.read_text())["reference"]
        expected, box = world.draw_references(clip.person[None], clip.setting[None],
                                              torch.Generator().manual_seed(clip.seed), 256)
        stored = torch.from_numpy(np.array(Image.open(row.reference))).permute(2, 0, 1)
        assert torch.equal(stored, world.to_uint8(expected[0])) and face["size"] == [256, 256]
        assert (torch.tensor(face["box"]) - box[0]).abs().max() < 1e-3
        assert ("landmarks" in face) == clip.marked
    assert min(sources[name] for name in ("given", "other clip", "other moment")) >= 2


# ------------------------------------------------------------ the command


def test_the_same_seed_gives_the_same_folder_and_another_one_other_people(tmp_path):
    first, again, other = (write_clips(tmp_path / str(k), 1, 2, seed)
                           for k, seed in enumerate((5, 5, 6)))
    a, b, c = (load_file(path.parent / "direct.safetensors") for path in (first, again, other))
    assert first.read_bytes() == again.read_bytes() and all(torch.equal(a[k], b[k]) for k in a)
    assert a.keys() == c.keys() and not any(torch.equal(a[k], c[k]) for k in a)


def test_a_folder_with_a_manifest_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "manifest.jsonl").write_text("mine")
    status, said = clip_world.main([str(tmp_path)]), capsys.readouterr().err
    assert status == 2 and "expected a new folder" in said and said.count("\n") == 1, said
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.jsonl"]
