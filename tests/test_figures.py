"""The pictures of README and docs: each can be drawn, and says what the code does.

The bundled weights are run once; elsewhere a clip is its reference, ever darker. Hardware: CPU.
Run: python -m pytest tests/test_figures.py
"""

import re
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from guidance import ORDERS, Guidance, guided_sum, stream_weights
from study import evaluate, figures
from toy import world


@pytest.fixture(scope="module")
def some_people():
    return evaluate.test_set(24, 1, 64, 9)


@pytest.fixture
def asked(monkeypatch, some_people):
    """What the sampler is asked for: a list of (captions, scales)."""
    calls = []

    def made(captions, references, **scales):
        calls.append((captions, scales))
        return references[:, :, None] - torch.linspace(0, 1, 9).view(9, 1, 1)
    known = {"inference": {"text_scale": 2.0, "ref_scale": 2.5}}
    monkeypatch.setattr(figures, "made", made)
    monkeypatch.setattr(figures, "models", lambda: SimpleNamespace(config=known))
    monkeypatch.setattr(evaluate, "test_set", lambda *sizes: some_people)
    figures.first_people.cache_clear()
    yield calls
    figures.first_people.cache_clear()


@pytest.mark.parametrize("name", [name for name in figures.FIGURES if name != "webp"])
def test_every_picture_is_drawn_twice_as_wide_as_a_page(name, asked, tmp_path):
    figures.save(figures.FIGURES[name][0](), tmp_path / "it.png")
    picture = Image.open(tmp_path / "it.png")
    assert picture.width == 1800
    assert (tmp_path / "it.png").stat().st_size < 1_000_000


def test_the_animation_has_the_clips_frames_and_repeats_for_ever(asked, tmp_path):
    figures.save(figures.webp(4), tmp_path / "it.webp")
    film = Image.open(tmp_path / "it.webp")
    assert (film.n_frames, film.info["loop"]) == (9, 0)
    assert (tmp_path / "it.webp").stat().st_size < 700_000


def test_the_bundled_weights_make_nine_frames_that_follow_the_reference_scale():
    caption, reference = world.all_captions()[0], torch.zeros(1, 3, 64, 64)
    seen, unseen = (figures.made([caption], reference, ref_scale=scale) for scale in (1.0, 0.0))
    assert seen.shape == unseen.shape == (1, 3, 9, 64, 64)
    assert seen.isfinite().all() and (seen - unseen).abs().mean() > 0.01


def test_the_two_words_under_a_person_are_the_prompts(asked):
    _, clips, words = figures.first_people(24)
    ((captions, _),) = asked
    assert len(clips) == len(words) == len(captions) == 24
    for told, caption in zip(words, captions, strict=True):
        place, action = told.split(", ")
        assert re.search(rf"\b{place}\b", caption), (told, caption)
        assert caption.replace("to the ", "").count(action) == 1, (told, caption)


def test_the_grid_of_scales_asks_for_all_pairs_of_one_prompt(asked):
    figures.scales()
    pairs = {(scales["text_scale"], scales["ref_scale"]) for _, scales in asked}
    assert pairs == {(text, ref) for text in (1, 1.5, 2, 3, 5) for ref in (0, 1, 2.5, 4)}
    assert len({tuple(captions) for captions, _ in asked}) == 1
    assert asked[0][0][0] in world.all_captions()


def test_a_wrong_face_costs_more_on_the_face_than_in_the_plain_loss():
    terms, estimates = figures.wrong_person([0.0, 0.5, 1.0])
    fm, face, identity = terms.T
    assert (face > 2 * fm).all()  # the title of the picture
    assert torch.allclose(fm, fm[:1].expand(3), atol=1e-5)
    assert identity[0].abs() < 1e-4 and 0.2 < identity[1] < identity[2]
    assert (estimates[0] - estimates[2]).abs().max() > 0.5


@pytest.mark.parametrize("order", ORDERS)
def test_the_formula_under_an_order_is_its_sum(order):
    v = dict(zip(("v_0", "v_T", "v_R", "v_RT"), torch.rand(4, 7).double(), strict=True))
    start, steps, words = figures.WALKS[order]
    formula = re.sub(r"(s_[TR]|\)) ?\(", r"\1 * (", "".join(words))
    told = eval(formula, {"s_T": 3.0, "s_R": 2.0} | v)  # noqa: S307 our own words
    assert torch.allclose(told, guided_sum(order, 3.0, 2.0, *v.values()))
    begin = guided_sum(order, *start, *v.values())
    assert torch.allclose(begin, v[words[0]])
    walked = begin + sum(((3.0, 2.0)[k] - start[k]) * (v[b] - v[a]) for k, a, b in steps)
    assert torch.allclose(told, walked)


@pytest.mark.parametrize("order", ORDERS)
def test_the_streams_beside_the_arrows_are_those_that_are_run(order):
    run = {figures.NAMES[stream] for stream in stream_weights(Guidance(3.0, 2.0, order))}
    assert run == {name for _, a, b in figures.WALKS[order][1] for name in (a, b)}


def test_an_unknown_name_is_one_line_and_status_2(capsys):
    assert figures.main(["rope", "cube"]) == 2
    told = capsys.readouterr().err
    assert "expected some of webp, pipeline" in told and told.count("\n") == 1
