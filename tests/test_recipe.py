"""train.py as people run it: files in, LoRA out, nothing lost when it is stopped, killed, or fed
bad numbers.

A random checkpoint of LTX-2.3's form and a dozen rendered clips of mixed codecs stand in for the
real ones; every test runs the real command, in this process or in another.

Hardware: CPU, about half a minute. Run: python -m pytest tests/test_recipe.py
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_lora import diffusers_output, loader, relative  # noqa: F401  (loader is a fixture)
from test_model import PREFIX, diffusers_twin
from tiny import SIZES, write_tiny

import sample
import train
from augment import AugmentStrength
from bench.clip_world import write_clips
from clips.dataset import Batch, Order, open_manifest
from clips.face import FaceNet
from common.seeds import seeded
from ltx.checkpoint import load_weights, open_file, read_metadata, write_file
from ltx.lora import add_lora, load_lora
from ltx.text import TextEncoder
from ltx.vae import VideoVAE
from model import VideoTransformer
from rope import Layout
from training.run import load_state

ROOT = Path(train.__file__).resolve().parent
PEOPLE, CLIPS, SEED = 4, 12, 1
LARGE = "64x64x9,64x64x1"  # what the clips were made for; smaller where the size does not matter
TERMS = {
    "loss",
    "fm",
    "face",
    "id",
    "lr",
    "gradient",
    "with_face",
    "with_id",
    "samples_per_second",
    "memory_gb",
}


def make_bench(folder: Path) -> Path:
    """tiny/ (checkpoint and text encoder), face.safetensors, clips/ with its manifest, and two
    manifests of the good rows alone: no-faces.jsonl, and some-faces.jsonl, where every second row
    has a faces file."""
    told = {"reference_placement": "tass", "known_phrases": '["a person"]'}
    write_tiny(folder / "tiny", metadata=told)
    torch.manual_seed(1)
    net = FaceNet((1, 1, 1, 1), (4, 4, 8, 8, 8), embedding=16, size=32)
    write_file(
        folder / "face.safetensors",
        {k: v for k, v in net.state_dict().items() if v.is_floating_point()},
        {},
    )
    lines = write_clips(folder / "clips", PEOPLE, CLIPS, SEED).read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if Path(row["video"]).stem.startswith("clip-")]
    assert len(rows) == CLIPS
    without = [{k: v for k, v in row.items() if k != "faces"} for row in rows]
    some = [row if n % 2 else bare for n, (row, bare) in enumerate(zip(rows, without, strict=True))]
    for name, table in (("no-faces", without), ("some-faces", some)):
        (folder / "clips" / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in table)
        )
    return folder


@pytest.fixture(scope="session")
def bench(tmp_path_factory) -> Path:
    return make_bench(tmp_path_factory.mktemp("bench"))


def words(
    bench: Path,
    out: Path,
    *more: object,
    manifest: str = "manifest",
    checkpoint: Path | None = None,
    cache: Path | None = None,
    buckets: str = "32x32x5,32x32x1",
) -> list[str]:
    """The command's arguments; later ones win."""
    tiny = bench / "tiny"
    parts = [
        "--checkpoint-path",
        checkpoint or tiny / "model.safetensors",
        "--gemma-root",
        tiny / "gemma",
        "--face",
        bench / "face.safetensors",
        "--manifest",
        bench / "clips" / f"{manifest}.jsonl",
        "--buckets",
        buckets,
        "--frame-rate",
        8,
        "--cache",
        cache or bench / "cache",
        "--precision",
        "fp32",
        "--lr",
        "2e-3",
        "--rank",
        4,
        "--batch",
        2,
        "--out",
        out,
        *more,
    ]
    return [str(part) for part in parts]


def parsed(arguments: list[str]):
    before, sys.argv = sys.argv, ["train.py", *arguments]
    try:
        return train.parse_arguments()
    finally:
        sys.argv = before


def command(arguments: list[str]) -> int:
    """train.py in this process; its status."""
    before, sys.argv = sys.argv, ["train.py", *arguments]
    try:
        return train.main()
    finally:
        sys.argv = before


def start(arguments: list[str], **options) -> subprocess.Popen:
    """train.py in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def told(error: str) -> list[str]:
    """The lines of stderr that are no progress bar."""
    return [
        piece
        for line in error.split("\n")
        for piece in line.split("\r")
        if piece.strip() and "%|" not in piece
    ]


def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """When each file was last written, and which file it is."""
    return {
        path.name: (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in folder.glob("*.safetensors")
    }


def same(a: Path, b: Path) -> bool:
    """Whether two states hold the same tensors, bit for bit."""
    x, y = (load_state(path)[0] for path in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@pytest.fixture(scope="session")
def trained(bench) -> Path:
    """A run of 40 steps."""
    assert command(words(bench, bench / "straight", "--steps", 40, "--lr", "4e-2")) == 0
    return bench / "straight"


# ------------------------------------------------------------ files in, files out


def test_three_steps_leave_lora_log_sheet_and_curves_and_a_second_command_goes_on(
    bench, tmp_path, monkeypatch, capsys
):
    """The validation clips are the same files as a second manifest; a second command makes no
    latent or context again, which the files' times show, and does not even load the text
    encoder."""
    out, cache = tmp_path / "out", tmp_path / "cache"
    look = ("--validation", bench / "clips" / "some-faces.jsonl", "--validate-every", 2)
    assert command(words(bench, out, "--steps", 3, *look, cache=cache, buckets=LARGE)) == 0
    assert f"{CLIPS} of {CLIPS + 9} rows are used" in capsys.readouterr().out
    first = log_of(out)
    assert [sorted(set(line) - {"step", "seconds"}) for line in first] == [
        sorted(TERMS),
        ["val_face", "val_fm"],
    ] * 2
    assert [line["step"] for line in first] == [2, 2, 3, 3]
    assert all(abs(v) < float("inf") for line in first for v in line.values())
    last = first[-2]
    assert last["loss"] == pytest.approx(last["fm"] + last["face"] + 0.1 * last["id"], rel=1e-5)
    for picture in ("sheet.png", "curves.png"):
        assert (out / picture).read_bytes()[:4] == b"\x89PNG", picture
    with open_file(out / "lora.safetensors") as file:
        assert (
            file.metadata()["reference_placement"] == "tass"
            and file.metadata()["training_steps"] == "3"
        )
        assert file.get_slice(
            "diffusion_model.transformer_blocks.0.attn1.to_q.lora_A.weight"
        ).get_shape() == [4, 48]
    made = stamps(cache)
    assert len(made) == CLIPS + distinct_captions(bench) + 1, "latents, contexts, the null prompt"

    def unwanted(*_, **__):
        raise AssertionError("the text encoder was loaded although every context was there")

    monkeypatch.setattr(TextEncoder, "load", unwanted)
    monkeypatch.setattr(VideoVAE, "encode", only_pictures(VideoVAE.encode))
    assert command(words(bench, out, "--steps", 5, *look, cache=cache, buckets=LARGE)) == 0
    assert stamps(cache) == made, "a cached file was written again"
    assert [line["step"] for line in log_of(out)] == [2, 2, 3, 3, 4, 4, 5, 5]
    with open_file(out / "lora.safetensors") as file:
        assert file.metadata()["training_steps"] == "5"
        assert "known_phrases" not in file.metadata(), "own captions teach other words"


def distinct_captions(bench: Path) -> int:
    lines = (bench / "clips" / "no-faces.jsonl").read_text().splitlines()
    return len({json.loads(line)["caption"] for line in lines})


def only_pictures(encode):
    """References are encoded in the step, one frame each; clips of several frames must come from
    the cache."""

    def encoded(self, video):
        assert video.shape[2] == 1, "a clip was encoded again"
        return encode(self, video)

    return encoded


def test_a_first_run_draws_its_own_curves(bench, tmp_path):
    """Without a second manifest the curves are those of the training itself, up to its last
    line."""
    assert command(words(bench, tmp_path, "--steps", 3)) == 0
    assert (tmp_path / "curves.png").exists()


def test_the_loss_falls_on_the_clips_it_is_trained_on(trained):
    """A random transformer learns in 40 steps at least to predict something of the right size."""
    found = [line["fm"] for line in log_of(trained)]
    print(found)
    assert len(found) == 4 and found[-1] < 0.8 * found[0], found


# ------------------------------------------------------------ faces, or none


@pytest.mark.parametrize(
    ("manifest", "off"), [("no-faces", ()), ("manifest", ("--w-face", 0, "--w-id", 0))]
)
def test_a_loss_that_nobody_has_is_no_number_in_the_log(bench, tmp_path, manifest, off):
    """Without faces files, and switched off: 0 would be a perfect face. Training goes on."""
    looked_at = bench / "clips" / f"{manifest}.jsonl"
    arguments = ("--steps", 4, *off, "--validation", looked_at)
    assert command(words(bench, tmp_path, *arguments, manifest=manifest)) == 0
    line, looked = log_of(tmp_path)
    assert not {"face", "id"} & set(line) and line["with_face"] == line["with_id"] == 0
    assert set(looked) == {"step", "seconds", "val_fm"}
    assert (
        line["loss"] == line["fm"] > 0
        and line["gradient"] > 0
        and (tmp_path / "lora.safetensors").exists()
    )


@pytest.mark.parametrize("family", ["color", "pose", "layout"])
def test_what_augmentation_refuses_is_refused_before_the_first_step(bench, tmp_path, family):
    arguments = words(bench, tmp_path, f"--augment-{family}", 2.01)
    with pytest.raises(ValueError, match=f"--augment-{family} between 0 and 2, got 2.01"):
        train.check_arguments(parsed(arguments))
    train.check_arguments(parsed([*arguments, f"--augment-{family}", "2"]))
    AugmentStrength(**{family: 2.0})


def test_with_faces_in_some_rows_the_log_says_how_often_each_loss_applied(bench, tmp_path):
    """The shares are counted a second time from the clips and draws of every step."""
    arguments = words(bench, tmp_path, "--steps", 6, "--batch", 3, manifest="some-faces")
    assert command(arguments) == 0
    args = parsed(arguments)
    vae = VideoVAE(read_metadata(args.checkpoint)["config"]["vae"])
    load_weights(vae, args.checkpoint, "vae.", torch.float32).eval()
    data = open_manifest(args.manifest, args, vae, "cpu")
    order, faces, judged = Order(data.groups, 3, args.seed), 0, 0
    for step in range(6):
        faces += sum(data.rows[i].faces is not None for i in order(step))
        generators = [seeded(args.seed, step, place) for place in range(3)]
        draws = train.draw(args, data.batch(order(step), generators), generators)
        judged += (draws.frame >= 0).sum().item()
    (line,) = log_of(tmp_path)
    assert 0 < faces < 18 and 0 < judged < faces
    assert line["with_face"] == pytest.approx(faces / 18, rel=1e-6)
    assert line["with_id"] == pytest.approx(judged / 18, rel=1e-6)
    assert line["face"] > 0 and line["id"] > 0


# ------------------------------------------------------------ stopped and killed


def test_killed_at_random_moments_it_ends_at_the_same_weights_bit_for_bit(bench, tmp_path):
    """SIGTERM once (status 143, everything saved, one line), then SIGKILL four times; each resumes
    where a state is.

    The stopped commands would go on for ever, whatever else the machine does; the rate is
    constant, so that a run does not depend on how long it is meant to be."""

    def arguments(name: str, steps: int) -> list[str]:
        return words(
            bench,
            tmp_path / name,
            "--steps",
            steps,
            "--final-lr",
            1,
            "--save-seconds",
            0,
            "--validate-every",
            10**9,
        )

    draw, reached, folder = random.Random(5), [], tmp_path / "killed"
    for number in [signal.SIGTERM] + [signal.SIGKILL] * 4:
        newest, process = max(stamps(folder), default=""), start(arguments("killed", 10**6))
        while process.poll() is None and max(stamps(folder), default="") == newest:
            time.sleep(0.005)  # until this command has saved a step of its own
        time.sleep(0.15 * draw.random())
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == (143 if number == signal.SIGTERM else -9), (
            process.returncode,
            error,
        )
        reached.append(int(max(stamps(folder))[6:14]))
        if number == signal.SIGTERM:
            (line,) = told(error)
            assert (
                f"stopped after step {reached[0]} of 1000000" in line
                and "the same command goes on" in line
            )
        assert len(stamps(folder)) <= 3, "the newest two, and perhaps the one before"
    print("stopped after steps", reached)
    assert reached == sorted(set(reached)), (
        "every command went on from where the one before was stopped"
    )
    steps = reached[-1] + 5
    assert command(arguments("killed", steps)) == command(arguments("straight", steps)) == 0
    assert same(
        *(tmp_path / name / f"state-{steps:08d}.safetensors" for name in ("killed", "straight"))
    )
    logged = [line["step"] for line in log_of(folder)]
    assert logged == sorted(set(logged)) and set(range(10, steps, 10)) <= set(logged), (
        "every line once"
    )


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_while_preparing_it_says_so_in_one_line(bench, tmp_path, number, status):
    """The signal comes when the rows are checked and latents are being made, before the first
    step."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "train.py"),
            *words(bench, tmp_path / "out", "--steps", 2, cache=tmp_path / "cache"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    while "rows are used" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status, (process.returncode, error)
    assert len(told(error)) == 1 and told(error)[0].startswith("train.py: "), error
    assert not (tmp_path / "out").exists() and not list((tmp_path / "cache").glob("*.partial"))


# ------------------------------------------------------------ the same files, elsewhere or changed


def rewrite(path: Path, name: str) -> None:
    """One number of a weights file, other than it was."""
    tensors, metadata = load_file(path), raw_metadata(path)
    tensors[name].view(-1)[0] += 1
    write_file(path, tensors, metadata)


def test_a_run_goes_on_with_moved_files_and_not_with_other_ones(
    bench, tmp_path, monkeypatch, capsys
):
    """Everything is copied elsewhere and given through relative paths and a link. Then each file in
    turn holds something else under its old name."""
    home, out = tmp_path / "home", tmp_path / "out"
    for name in ("tiny", "clips"):
        shutil.copytree(bench / name, home / name)
    shutil.copy(bench / "face.safetensors", home)
    assert command(words(bench, out, "--steps", 2)) == 0
    (home / "link").symlink_to("tiny/model.safetensors")
    monkeypatch.chdir(home)
    moved = ["--manifest", "clips/manifest.jsonl", "--gemma-root", "tiny/gemma", "--root", "clips",
             "--checkpoint-path", "link", "--face", "face.safetensors"]
    arguments = [*words(bench, out), *moved, "--offload-text", "cpu", "--steps"]
    capsys.readouterr()
    assert command([*arguments, "3"]) == 0
    assert told(capsys.readouterr().err) == [] and log_of(out)[-1]["step"] == 3
    faces = next((home / "clips").rglob("*.json"))
    changes = {
        "checkpoint": lambda: rewrite(home / "tiny/model.safetensors", PREFIX + "proj_out.bias"),
        "text model": lambda: rewrite(home / "tiny/gemma/model.safetensors", "model.norm.weight"),
        "recogniser": lambda: rewrite(home / "face.safetensors", "fc.bias"),
        "clips": lambda: faces.write_text(faces.read_text() + " "),
    }
    for what, change in reversed(changes.items()):  # the last one is looked at last
        change()
        assert command([*arguments, "4"]) == 2, what
        (line,) = told(capsys.readouterr().err)
        assert f"expected the {what} with which the run in {out} was begun (then " in line, line
        assert line.endswith("; give that again, or choose another --out"), line
    assert max(path.name for path in out.glob("state*")) == "state-00000003.safetensors"


# ------------------------------------------------------------ bad numbers, full disks


@pytest.fixture
def spoilt(bench, tmp_path, monkeypatch):
    """A copy of the checkpoint, trained on for two steps, in which one weight is then no number
    any more; its content is not looked at."""
    monkeypatch.setattr(train, "identity", lambda path: "the same")
    checkpoint, out = tmp_path / "model.safetensors", tmp_path / "out"
    shutil.copy(bench / "tiny" / "model.safetensors", checkpoint)
    assert command(words(bench, out, "--steps", 2, checkpoint=checkpoint)) == 0
    tensors, metadata = load_file(checkpoint), raw_metadata(checkpoint)
    tensors[PREFIX + "transformer_blocks.1.ff.net.2.weight"][3, 5] = float("nan")
    write_file(checkpoint, tensors, metadata)
    return checkpoint, out


def raw_metadata(path: Path) -> dict[str, str]:
    with open_file(path) as file:
        return file.metadata()


def test_a_loss_that_is_not_a_number_stops_before_it_reaches_the_weights(bench, spoilt, capsys):
    """Status 2, one line with step, term and rows; the last good state is as it was, and there is
    no later one."""
    checkpoint, out = spoilt
    before = stamps(out)
    capsys.readouterr()
    assert command(words(bench, out, "--steps", 6, "--save-seconds", 0, checkpoint=checkpoint)) == 2
    lines = told(capsys.readouterr().err)
    assert len(lines) == 1 and lines[0].startswith(
        "train.py: error: expected finite numbers, got nan"
    ), lines
    assert "flow matching at step 2, rows " in lines[0] and lines[0].count("clip-") == 2, lines
    after = stamps(out)
    assert (
        set(after) == set(before) == {"lora.safetensors", "state-00000002.safetensors"}
        and after == before
    )
    tensors, info = load_state(out / "state-00000002.safetensors")
    assert info["step"] == 2 and all(t.isfinite().all() for t in tensors.values())


def test_a_full_disk_loses_nothing_that_was_saved_before(bench, tmp_path):
    """No file may grow beyond half a state's size: status 2, one line that names the state that is
    still good."""
    arguments = words(bench, tmp_path, "--steps")
    assert command([*arguments, "2"]) == 0
    state = tmp_path / "state-00000002.safetensors"
    kept, most = state.read_bytes(), state.stat().st_size // 2

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    process = start([*arguments, "3"], preexec_fn=small_disk)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2, error
    (line,) = told(error)
    assert (
        line.startswith("train.py: error: cannot save step 3") and f"{state} is still good" in line
    ), line
    assert state.read_bytes() == kept and load_state(state)[1]["step"] == 2
    wanted = {state.name, "lora.safetensors", "log.jsonl", "sheet.png", "curves.png"}
    assert {path.name for path in tmp_path.iterdir()} <= wanted, "no half-written file is left"
    assert command([*arguments, "3"]) == 0, "with room again the same command goes on"
    assert (tmp_path / "state-00000003.safetensors").exists()


# ------------------------------------------------------------ what a run has written


def test_sample_makes_a_video_with_the_lora_of_a_run(bench, trained, tmp_path):
    tiny = bench / "tiny"
    arguments = [
        "--ref",
        tiny / "face.png",
        "--prompt",
        "a person in a red shirt laughs",
        "--checkpoint-path",
        tiny / "model.safetensors",
        "--gemma-root",
        tiny / "gemma",
        "--output-path",
    ]
    plain, moved = tmp_path / "plain.mp4", tmp_path / "moved.mp4"
    assert sample.main([str(a) for a in (*arguments, plain)]) == 0
    assert (
        sample.main([str(a) for a in (*arguments, moved, "--lora", trained / "lora.safetensors")])
        == 0
    )
    assert moved.stat().st_size > 500 and moved.with_suffix(".png").exists()
    sheets = [path.with_suffix(".png").read_bytes() for path in (plain, moved)]
    assert sheets[0] != sheets[1], "the LoRA changes the video"


def test_a_run_its_lora_and_its_lora_in_diffusers_agree(bench, trained, loader):  # noqa: F811
    """float32: 1e-5 of the largest output between the two loaders; 1 % to the averaged weights of
    the state, because the file holds bf16. Diffusers' positions count in other units: its own
    largest ones are built in."""
    path, checkpoint = trained / "lora.safetensors", bench / "tiny" / "model.safetensors"
    base = load_weights(VideoTransformer(SIZES), checkpoint, PREFIX, torch.float32).eval()
    g, B, S = torch.Generator().manual_seed(2), 2, 12
    positions = torch.rand(B, 3, S, 1, generator=g) + torch.tensor([0.0, 0.1])  # (B, 3, S, 2)
    batch = {
        "latent": torch.randn(B, S, SIZES.in_channels, generator=g),
        "timesteps": torch.full((B, S), 0.4),
        "sigma": torch.full((B,), 0.4),
        "positions": positions,
        "context": torch.randn(B, 5, SIZES.dim, generator=g),
    }
    units = torch.tensor([20 / SIZES.max_pos[0], 2048 / SIZES.max_pos[1], 2048 / SIZES.max_pos[2]])[
        :, None, None
    ]
    twin = diffusers_twin(base)
    theirs = {**batch, "positions": batch["positions"] * units}
    with torch.no_grad():
        before = base(**batch)
    assert relative(diffusers_output(twin, theirs), before) < 1e-5, "the two bases agree"
    loader(twin).load_lora_weights(str(path))
    after = diffusers_output(twin, theirs)
    load_lora(base, path)
    with torch.no_grad():
        ours = base(**batch)
    run = load_weights(VideoTransformer(SIZES), checkpoint, PREFIX, torch.float32).eval()
    add_lora(run, rank=4, alpha=4)
    state = load_state(trained / "state-00000040.safetensors")[0]
    with torch.no_grad():
        for name, parameter in run.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(state[f"ema.{name}"])
        direct = run(**batch)
    moved, found, kept = (
        relative(before, after),
        relative(ours, after),
        relative(ours - before, direct - before),
    )
    print(
        f"moved by {moved:.1e}, ours and diffusers' {found:.1e}, of the run's own change {kept:.1e}"
    )
    assert moved > 100 * found and moved > 1e-3 and found < 1e-5 and kept < 1e-2


def test_noise_on_reference_tokens_and_the_reach_of_the_identity_loss_follow_their_flags():
    """What the flags do not touch is drawn as without them."""
    n = 64
    batch = Batch(index=list(range(n)), grid=(2, 2, 2), frame_rate=8.0, x0=torch.zeros(n, 8, 4),
                  context=torch.zeros(n, 1, 1), face=torch.ones(n, 8), boxes=torch.zeros(n, 5, 4),
                  landmarks=torch.zeros(n, 5, 5, 2), seen=torch.tensor([[0, 1, 0, 1, 1]] * n) > 0,
                  reference=torch.rand(n, 3, 16, 16), reference_box=torch.zeros(n, 4),
                  reference_landmarks=torch.zeros(n, 5, 2),
                  reference_seen=torch.ones(n, dtype=torch.bool))

    def drawn(*words):
        args = train.parse_arguments(["--drop-ref", "0", "--drop-both", "0", *words])
        return train.draw(args, batch, [seeded(1, k) for k in range(n)])
    plain, noisy, far = drawn(), drawn("--noise-ref", "0.3"), drawn("--id-sigma", "0.9")
    assert plain.noise_ref.shape == (n, 0, 4) and noisy.noise_ref.shape == (n, 4, 4)
    assert 0.9 < noisy.noise_ref.std() < 1.1
    for name in ("sigma", "noise", "reference", "frame"):
        assert torch.equal(getattr(plain, name), getattr(noisy, name)), name
    assert torch.equal(plain.frame >= 0, plain.sigma <= 0.5)
    assert torch.equal(far.frame >= 0, far.sigma <= 0.9)
    assert set(far.frame.tolist()) == {-1, 1, 3, 4}, "frames with a known face, each at times"
    at_once = train.draw(train.parse_arguments([]), batch, seeded(1))
    assert at_once.noise.shape == plain.noise.shape and 0.9 < at_once.noise.std() < 1.1


def test_noise_lies_on_the_reference_in_training_and_not_where_losses_are_held_out():
    args = train.parse_arguments(["--noise-ref", "0.3"])
    latent = torch.randn(64, 4, 1, 4, 4, generator=seeded(2)) * 5
    vae = SimpleNamespace(encode=lambda pictures: latent)
    draws = train.Draws(torch.ones(64, dtype=torch.bool), torch.ones(64, dtype=torch.bool),
                        torch.ones(64), torch.zeros(64, 32, 4), torch.zeros(64, 3, 32, 32),
                        torch.randn(64, 16, 4, generator=seeded(3)), torch.full((64,), -1))

    def tokens(noise):
        draws.noise_ref = noise
        return train.shown(args, vae, draws, Layout(2, 4, 4), (False, False))[0].tokens
    noise = draws.noise_ref
    clean, noisy = tokens(torch.zeros(64, 0, 4)), tokens(noise)
    assert torch.equal(clean, latent.flatten(2).mT)
    assert abs((noisy - clean).std() / clean.std() - 0.3) < 0.01
