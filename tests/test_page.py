"""The explorer page: its numbers are the repository's, and a real browser can use it.

The small page is made once from the bundled weights. What needs a browser is skipped where no
Chromium is installed. Hardware: CPU, half a minute. Run: python -m pytest tests/test_page.py
"""

import base64
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from browser import Browser
from PIL import Image
from safetensors.torch import save_file

import model as model_file
from augment import AugmentStrength, augment_color, augment_layout, augment_pose, augment_reference
from bench import exercises
from common.seeds import seeded
from guidance import Guidance, stream_weights
from model import TransformerConfig, VideoTransformer
from reference import Reference, letterbox, predict_velocity
from rope import Layout, score_map
from study import page
from training.run import load_state

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome",
                                                "chromium-headless-shell"))), None)


def keep_two_exercises(call, **options):
    """In the place of `python -m bench.exercises --keep`, which takes minutes: one exercise with
    clips, dark before and light after, and one with lines."""
    assert call[1:5] == ["-m", "bench.exercises", "--people", "5"]
    folder = page.Path(call[-1])
    folder.mkdir()
    for name, value in (("plain-0", 60), ("1", 200)):
        clips = torch.full((5, 3, 9, 64, 64), value, dtype=torch.uint8)
        save_file({"video": clips}, folder / f"{name}.safetensors", {"info": "{}"})
    first, *_, last = exercises.read((page.HERE / "docs" / "exercises.md").read_text())
    scores = dict.fromkeys(exercises.SCORES, [0.5, 0.1])
    exercises.keep(folder, first, {"before": ("plain-0", scores, []),
                                   "after": ("1", scores | {"action": [0.25, 0.1]}, [])})
    exercises.keep(folder, last, {"before": ("plain-1", {}, ["same", "row 1"]),
                                  "after": ("12", {}, ["same", "row 2"])})
    return subprocess.CompletedProcess(call, 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The small page, its data, and the folder of its clips."""
    folder = tmp_path_factory.mktemp("page")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "QUICK", page.QUICK._replace(exercises=5))
        patch.setattr(page.subprocess, "run", keep_two_exercises)
        words = ["--quick", "--output-path", str(folder / "it.html"), "--folder", str(folder)]
        assert page.main(words) == 0
    return (folder / "it.html", read_data(folder / "it.html"),
            next(p for p in folder.iterdir() if p.is_dir()))


def tiles(address: str, size: int = 64) -> torch.Tensor:
    """A sheet -> (rows, columns, size, size, 3) uint8."""
    assert address.startswith("data:image/webp;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB")
    return torch.from_numpy(np.array(image)).unflatten(0, (-1, size)).unflatten(2, (-1, size)
                                                                                ).transpose(1, 2)


# ------------------------------------------------------------ what the page holds


@pytest.mark.parametrize("file", ["small", "shipped"])
def test_the_page_is_one_small_file_that_asks_the_network_for_nothing(made, file):
    path = made[0] if file == "small" else page.PAGE
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size <= 5_000_000
    shown = re.sub(r'<script id="data".*?</script>', "", text, flags=re.S)
    assert not re.findall(r'(?:src|srcset)=|@import|url\(|import\(|fetch\(', shown)
    assert re.findall(r'https?://[^"\s]+', shown) == ["https://arxiv.org/abs/2606.02441"]


def test_a_clip_stands_where_its_order_scales_person_and_prompt_say(made):
    _, data, folder = made
    dials = data["dials"]
    assert dials["texts"] == [1.0, 2.0] and dials["refs"] == [1.0, 2.5] == [1, dials["usual"][1]]
    assert list(dials["sheets"]) == ["text_first", "two_deltas"] and len(dials["prompts"]) == 2
    for order, text, ref in (("text_first", 1, 0), ("two_deltas", 1, 0), ("two_deltas", 1, 1)):
        name = f"{order}-{dials['texts'][text]:g}-{dials['refs'][ref]:g}.safetensors"
        clips = load_state(folder / name)[0]["video"]                       # (4, 3, 9, 64, 64)
        for person in (0, 1):
            shown = tiles(dials["sheets"][order][person])
            for prompt in (0, 1):
                clip = clips[2 * person + prompt].permute(1, 2, 3, 0).float()
                errors = (shown.float() - clip).abs().mean(dim=(1, 2, 3, 4))
                at = 2 * (2 * text + ref) + prompt
                assert errors.argmin() == at and errors[at] < 10  # of 255: WebP
        weights = stream_weights(Guidance(dials["texts"][text], dials["refs"][ref], order))
        told = dials["weights"][order][2 * text + ref]
        assert told == {page.NAMES[stream]: w for stream, w in weights.items()}
    assert all(0 <= v <= 1 for rows in dials["prompt"].values() for row in rows for v in row)
    assert len([*folder.glob("t*-*-*")]) == 6  # of 8: at text scale 1 these orders are one sum
    assert dials["similarity"]["text_first"][:2] == dials["similarity"]["two_deltas"][:2]
    assert dials["similarity"]["text_first"][2:] != dials["similarity"]["two_deltas"][2:]


@pytest.mark.parametrize("placement", ["tass", "overlap", "time_only"])
def test_scores_by_place_are_ropes(placement):
    layout, config = Layout(4, 5, 6, placement=placement), TransformerConfig()
    scores = page.place_scores(layout, config)                              # (L, R)
    assert scores.shape == (120, 30)
    for frame in (0, 3):
        middle = scores[frame * 30 + 5 // 2 * 6 + 3].view(5, 6)
        assert torch.allclose(middle, score_map(layout, frame), atol=1e-5)


def test_attention_is_what_the_model_uses(monkeypatch):
    """PyTorch's own attention, given one-hot values, hands out its weights."""
    config = TransformerConfig(in_channels=8, out_channels=8, num_layers=2, heads=2, head_dim=12)
    model, layout, used = VideoTransformer(config), Layout(2, 2, 3), []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    x, tokens, context = torch.randn(1, 12, 8), torch.randn(1, 6, 8), torch.randn(1, 4, 24)
    given = x, torch.tensor([0.6]), context
    true = F.scaled_dot_product_attention

    def noting(q, k, v, attn_mask=None):
        if k.shape[2] == 18:  # not the prompt's
            one_hot = torch.eye(18).expand(*k.shape[:2], 18, 18)
            used.append(true(q, k, one_hot)[0].mean(0))                     # (S, S)
        return true(q, k, v, attn_mask)
    monkeypatch.setattr(model_file.F, "scaled_dot_product_attention", noting)
    found = page.attention(model, *given, tokens, layout)                   # (2, 12, 18)
    assert found.shape == (2, 12, 18)
    assert torch.allclose(found, torch.stack(used)[:, :12], atol=1e-5)
    predict_velocity(model, x, given[1], layout.video_positions(), context,
                     Reference(tokens, layout.reference_positions()))
    with page.listening(model) as heard:
        pass
    assert heard == [[], []] and not model.transformer_blocks[0].attn1.q_norm._forward_hooks


def test_attention_of_the_page_is_shares_of_one(made):
    places = made[1]["places"]
    R = places["grid"][1] * places["grid"][2]
    L, rows = R * places["grid"][0], places["layers"] + 1
    assert places["usual"] in places["placements"]
    for name in places["placements"]:
        shares = np.frombuffer(base64.b64decode(places["placements"][name]["share"]), np.uint8)
        shares = shares.reshape(len(places["levels"]), rows, L) / 255
        assert 0.001 < shares.mean() < 0.9
        assert np.abs(shares[:, 0] - shares[:, 1:].mean(1)).max() < 0.01    # first: over all layers
        image = places["placements"][name]["attention"].partition(",")[2]
        cells = np.array(Image.open(io.BytesIO(base64.b64decode(image))))[..., 0]
        assert cells.shape == (shares.size, R) and (cells.max(1) == 255).all()


def test_the_walk_ends_at_the_clip_and_names_the_streams_weights(made):
    walk = made[1]["walk"]
    assert walk["sigmas"][0] == 1 and walk["sigmas"][-1] == 0 and len(walk["sigmas"]) == 4
    rows = tiles(walk["sheet"]).float()                                     # (3, 6 * 3, ...)
    assert rows.shape[:2] == (len(walk["runs"]), 6 * walk["frames"]) == (3, 18)
    spread = rows.std(dim=(2, 3, 4))
    assert (rows[0, :3] - rows[0, 15:]).abs().mean() > 10                   # noise is no estimate
    assert sum(walk["weights"]) == pytest.approx(1) and walk["weights"][2] == 0
    assert spread.min() > 5


def test_a_copy_costs_nothing_unchanged_and_more_with_strength(made):
    augment = made[1]["augment"]
    assert augment["mean"][0] == 0 and augment["own"][0] == [0, 0]
    assert augment["mean"][-1] > augment["mean"][1] > 0        # all at 2, layout at 0.5
    shown = tiles(augment["sheet"]).float()
    assert len(shown) == 64 and (shown[0] - shown[-1]).abs().mean() > 10
    picture = letterbox(Image.open(page.HERE / "examples" / "ada.png"), 64, 64)[None]
    # Row 16 c + 4 p + l: colour, pose and layout. Here all of them at strength 2.
    copies = picture.expand(augment["copies"], -1, -1, -1)
    copies = augment_reference(copies, seeded(0), AugmentStrength(2, 2, 2))
    price = ((copies - picture).numpy() ** 2).mean() / picture.numpy().var(ddof=1)
    assert augment["mean"][-1] == pytest.approx(price, abs=1e-3)
    for row, change in ((48, augment_color), (12, augment_pose), (3, augment_layout)):
        error = (tiles(augment["sheet"])[row, 1].permute(2, 0, 1) / 127.5 - 1
                 - change(picture[0], seeded(1, 1), 2.0)).abs().mean()
        assert error < 0.1, change


def test_exercises_keep_what_changed(made):
    first, last = made[1]["exercises"]
    assert (first["number"], last["number"]) == (1, 12)
    assert first["before"]["scores"]["action"] == "50 %"
    assert first["after"]["scores"]["action"] == "25 %"
    assert abs(tiles(first["before"]["sheet"]).float().mean() - 60) < 3
    assert tiles(first["after"]["sheet"]).shape[:2] == (4, 5)
    assert last["lines"] == [["row 1", "row 2"]] and "sheet" not in last["before"]
    assert "H * in_space" in first["change"][0] and first["file"] == "rope.py"


def read_data(path: Path) -> dict:
    """What a page holds."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.S)
    return json.loads(found[1])


@pytest.mark.parametrize("file", ["small", "shipped"])
def test_every_named_function_is_in_its_file(made, file):
    data = made[1] if file == "small" else read_data(page.PAGE)
    for panel in ("dials", "places", "walk", "augment"):
        for told in data[panel]["sources"]:
            whole = (page.HERE / told["file"]).read_text(encoding="utf-8")
            assert re.search(rf"^(def|class) {told['name']}\b", whole, re.M), told["name"]
            assert re.search(rf"^(def|class) {told['name']}\b", told["text"], re.M)
            assert file == "shipped" or told["text"] in whole


def test_an_exercise_that_fails_is_one_line_and_no_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "QUICK", page.QUICK._replace(exercises=5))
    for panel in ("dials", "places", "walk", "augmentation"):
        monkeypatch.setattr(page, panel, lambda studio: {})
    monkeypatch.setattr(page.subprocess, "run", lambda call, **_: subprocess.CompletedProcess(
        call, 2, "", "bar\nbench.exercises: error: expected x, got y; do z\n"))
    words = ["--quick", "--output-path", str(tmp_path / "it.html"), "--folder", str(tmp_path / "f")]
    assert page.main(words) == 2
    line = capsys.readouterr().err
    assert line.startswith("study.page: error: expected exercises that run, got status 2: bench.")
    assert line.count("\n") == 1 and not (tmp_path / "it.html").exists()


@pytest.mark.parametrize("words, told", [
    (["--output-path", "it.txt"], "expected a file name that ends in .html"),
    (["--quick", "--folder", "taken"], "expected a folder to write in, got taken")])
def test_what_cannot_be_is_one_line_and_status_2(words, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setattr(page, "PAGE", tmp_path / "it.html")
    assert page.main(words) == 2
    line = capsys.readouterr().err
    assert told in line and line.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


def test_a_page_that_is_too_large_is_not_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page, "Studio", lambda *given: None)
    monkeypatch.setattr(page, "explorer", lambda studio: "x" * (page.MOST_BYTES + 1))
    words = ["--output-path", str(tmp_path / "it.html"), "--folder", str(tmp_path / "kept")]
    assert page.main(words) == 2 and "at most 5,000,000 bytes" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser(made):
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with Browser(CHROMIUM, made[0].as_uri()) as it:
        it.wait("[...pictures.values()].every((image) => image.complete)")
        it.value("if (playing) $('play').click()")
        yield it


def look(browser: Browser, names: str) -> dict:
    """What each of these elements shows: the pixels of a canvas, the words of another."""
    return {name: browser.value(f"(() => {{ const e = $({name!r}); return e.toDataURL ? "
                                "e.toDataURL() : e.textContent; })()") for name in names.split()}


WATCHED = ("dial-clip dial-reference dial-like-is dial-text-is dial-ref-is dial-sum place-map "
           "place-alone place-real place-told walk-told augment-shown augment-own augment-mean "
           "exercise-change exercise-shown exercise-scores")
# A control, and what it changes of WATCHED: no more and no less.
USES = [
    ("press input[name=person][value='1']", "dial-clip dial-reference dial-like-is"),
    ("press input[name=prompt][value='1']", "dial-clip dial-like-is"),
    ("press input[name=order][value='1']", "dial-clip dial-like-is dial-sum"),
    ("key #dial-text ArrowLeft", "dial-clip dial-like-is dial-text-is dial-sum"),
    ("key #dial-ref ArrowLeft", "dial-clip dial-like-is dial-ref-is dial-sum"),
    ("press #dial-usual", "dial-clip dial-like-is dial-text-is dial-ref-is dial-sum"),
    ("press #dial-tables [data-text='0'][data-ref='1']",
     "dial-clip dial-like-is dial-text-is dial-sum"),
    ("choose #place-which 1", "place-map place-alone place-real place-told"),
    ("choose #place-layer 3", "place-real place-told"),
    ("choose #place-level 0", "place-real place-told"),
    ("press #place-frames figure:nth-child(2) canvas",
     "place-map place-alone place-real place-told"),
    ("key #place-frames figure:nth-child(2) canvas ArrowUp",
     "place-map place-alone place-real place-told"),
    ("touch #place-frames figure:nth-child(3) canvas",
     "place-map place-alone place-real place-told"),
    ("key #walk-step ArrowRight", "walk-told"),
    ("key #augment-colour ArrowRight", "augment-shown augment-own augment-mean"),
    ("key #augment-pose ArrowRight", "augment-shown augment-own augment-mean"),
    ("key #augment-layout ArrowRight", "augment-shown augment-own augment-mean"),
    ("press #augment-dice", "augment-shown augment-own"),
    ("key #exercise-side Enter", "exercise-shown"),
    ("press #exercise-side", "exercise-shown"),
    ("choose #exercise-which 1", "exercise-change exercise-shown exercise-scores"),
]


def use(browser: Browser, words: str) -> None:
    how, rest = words.split(" ", 1)
    if how in ("press", "touch"):
        browser.point(rest, 0.7, 0.3, touch=how == "touch")
        return
    selector, last = rest.rsplit(" ", 1)
    browser.value(f"document.querySelector({selector!r}).focus()")
    if how == "key":
        browser.press(last)
    else:
        browser.value(f"(() => {{ const e = document.querySelector({selector!r}); e.value = {last};"
                      "e.dispatchEvent(new Event('change')); })()")


def test_each_control_changes_what_it_should_and_nothing_else(browser):
    for words, wanted in USES:
        before, strips = look(browser, WATCHED), strips_of(browser)
        use(browser, words)
        browser.wait("[...pictures.values()].every((image) => image.complete)")
        after = look(browser, WATCHED)
        changed = {name for name in before if before[name] != after[name]}
        assert changed == set(wanted.split()), (words, changed)
        moved = [a != b for a, b in zip(strips, strips_of(browser), strict=True)]
        assert moved[:6] == [words.startswith("key #walk")] * 6, words
        assert any(moved[6:]) == ("exercise-side" in words), words
    assert browser.errors == []


def strips_of(browser: Browser) -> list[str]:
    return browser.value("[...document.querySelectorAll('.strip canvas')]"
                         ".map((canvas) => canvas.toDataURL())")


def test_the_browser_shows_the_clip_that_was_chosen(browser, made):
    clips = {path.stem: load_state(path)[0]["video"][1, :, 4] for path in made[2].glob("t*-*-*")}
    for wanted in ("two_deltas-2-1", "text_first-2-2.5"):
        order, text, ref = wanted.split("-")
        browser.value(f"""Object.assign(dial, {{person: 0, prompt: 1,
            order: orders.indexOf('{order}'), text: dials.texts.indexOf({text}),
            ref: dials.refs.indexOf({ref})}}); moment = 4; drawDials()""")
        browser.wait("[...pictures.values()].every((image) => image.complete)")
        pixels = browser.value("""(() => {
            const pen = new OffscreenCanvas(64, 64).getContext("2d", {willReadFrequently: true});
            pen.drawImage($("dial-clip"), 0, 0);
            return Array.from(pen.getImageData(0, 0, 64, 64).data); })()""")
        shown = torch.tensor(pixels).view(64, 64, 4)[..., :3].permute(2, 0, 1).float()
        errors = {name: (clip - shown).abs().mean().item() for name, clip in clips.items()}
        assert min(errors, key=errors.get) == wanted and errors[wanted] < 10
    similarity = made[1]["dials"]["similarity"]["text_first"]               # (pairs, clips)
    assert browser.value("$('dial-like-is').textContent") == f"{similarity[3][1]:.2f}"


def test_clips_play_and_exercises_flicker_only_when_they_are_told_to(browser):
    browser.value("Object.assign(exercise, {which: 0}); drawExercise()")
    for button, shown in (("play", "moment"), ("exercise-flicker", "exercise.side")):
        browser.value(f"window.was = {shown}")
        assert browser.value(f"$('{button}').ariaPressed") == "false"
        use(browser, f"press #{button}")
        browser.wait(f"{shown} !== window.was", 5)
        assert browser.value(f"$('{button}').ariaPressed") == "true"
        use(browser, f"press #{button}")
        browser.value(f"window.was = {shown}")
        assert browser.value(f"new Promise((done) => setTimeout(() => done({shown} === was), 700))")


CONTRAST = """(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const shade = (text) => {  // color-mix gives numbers from 0 to 1
    const [r, g, b] = parse(text).slice(0, 3).map((v) => text.startsWith("color(") ? v : v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ground = (e) => { for (; e; e = e.parentElement) {
    const text = getComputedStyle(e).backgroundColor.replace("srgb", "");
    if (text !== "rgba(0, 0, 0, 0)") return text; } return "rgb(255, 255, 255)"; };
  const low = [];
  for (const e of document.querySelectorAll("body *")) {
    if (!e.checkVisibility() || e.disabled || ["SCRIPT", "CANVAS", "OPTION"].includes(e.tagName))
      continue;
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
    const [a, b] = [shade(getComputedStyle(e).color), shade(ground(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (!(ratio >= 4.5)) low.push([e.tagName, e.id, e.textContent.slice(0, 30), ratio]);
  }
  return low; })()"""
NAMELESS = """[...document.querySelectorAll("canvas, img, svg, input, select, button, meter, a")]
  .filter((e) => !(e.ariaLabel || e.alt || e.labels?.length && e.labels[0].textContent.trim()
                   || e.textContent.trim() && !["SELECT", "CANVAS"].includes(e.tagName)))
  .map((e) => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_can_be_read_and_everything_has_a_name(browser, theme):
    if browser.value("document.documentElement.dataset.theme") != theme:
        use(browser, "press #theme")
    assert browser.value("document.documentElement.dataset.theme") == theme
    browser.value("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert browser.value(CONTRAST) == []
    assert browser.value(NAMELESS) == []
    assert browser.value("new Set([...document.querySelectorAll('[id]')].map((e) => e.id)).size "
                         "=== document.querySelectorAll('[id]').length")
    assert browser.value("document.documentElement.lang") == "en"


def test_the_page_fits_a_phone_and_a_finger_chooses_a_token(browser):
    browser.resize(390, 800)
    try:
        assert browser.value("document.documentElement.scrollWidth") <= 390
        use(browser, "touch #place-frames figure:nth-child(1) canvas")
        # 0.7 across and 0.3 down 8 x 8 cells
        assert browser.value("place.token") == 2 * 8 + 5
        use(browser, "touch input[name=order][value='0']")
        assert browser.value("orders[dial.order]") == "text_first"
    finally:
        browser.resize(1280)


def test_the_shipped_page_opens_without_a_complaint_and_fits_a_phone():
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with Browser(CHROMIUM, page.PAGE.as_uri(), width=390) as browser:
        browser.wait("[...pictures.values()].every((image) => image.complete)")
        assert browser.value("document.documentElement.scrollWidth") <= 390
        assert browser.errors == [] and browser.value(CONTRAST) == [] == browser.value(NAMELESS)


def test_tab_reaches_every_control(browser):
    browser.value("document.querySelectorAll('details').forEach((e) => { e.open = false; }); "
                  "document.body.tabIndex = -1; document.body.focus(); window.reached = new Set()")
    for _ in range(120):
        browser.press("Tab")
        browser.value("reached.add(document.activeElement)")
    missing = browser.value("""[...document.querySelectorAll(
        "select, button, input[type=range], canvas[tabindex], input:checked, summary")]
        .filter((e) => !e.disabled && !reached.has(e)).map((e) => e.outerHTML.slice(0, 80))""")
    assert missing == []
    assert browser.errors == []
