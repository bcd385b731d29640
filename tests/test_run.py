"""A training that is stopped at any moment ends where one ends that never was, and keeps its log.

Hardware: CPU, some seconds. Run: python -m pytest tests/test_run.py
"""

import json
import os
import signal

import pytest
import torch
from torch import nn

from common.seeds import seeded
from training.optim import EMA, MuonAdamW, schedule, split_parameters
from training.run import Run, check_finite, descend, load_state


def toy_run(folder, until=30, save_seconds=120, keep=2, during=lambda step: None, minutes=9):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    named = dict(model.named_parameters())
    optimizer = MuonAdamW(*split_parameters(named, keep_out=("2.",)))
    run = Run(folder, named, optimizer, EMA(named), keep=keep)
    for step in run.steps(until, minutes, 4, "toy", save_seconds):
        during(step)
        x = torch.randn(4, 6, generator=seeded(0, step, run.rank))
        loss = (model(x) - x[:, :2]).square().mean()
        descend(run, step, loss, schedule(step, 30, warmup=5), "clips")
        run.ema.update(named, step)
        run.record(loss=loss.item())
    return run, {k: v.clone() for k, v in named.items()}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Folder and weights of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, toy_run(folder)[1]


def same(weights, others):
    return all(torch.equal(weights[name], others[name]) for name in weights)


# ------------------------------------------------------------ states


def test_an_interrupted_run_ends_at_the_same_weights_bit_for_bit(straight, tmp_path):
    stops = []
    for until, minutes in ((10, 9), (30, 0), (30, 0), (30, 9)):  # no time: one step, no fewer
        run, weights = toy_run(tmp_path, until, minutes=minutes)
        stops.append(run.done)
    assert stops == [10, 11, 12, 30] and same(straight[1], weights)
    a, b = (load_state(x / "state-00000030.safetensors")[0] for x in (straight[0], tmp_path))
    assert a.keys() == b.keys() and same(a, b)
    assert len(list(tmp_path.glob("state-*"))) == 2, "the newest two are kept"


def test_a_damaged_state_is_passed_over_and_pushes_out_none_that_can_be_read(tmp_path, capsys):
    for until in (10, 20):
        toy_run(tmp_path, until)
    (tmp_path / "state-00000020.safetensors").write_bytes(b"half a state")
    run = toy_run(tmp_path, 20, keep=1)[0]
    assert run.done == 20 and capsys.readouterr().err.count("cannot be read") == 1
    (tmp_path / "state-00000025.safetensors").write_bytes(b"half a state")
    run.done = 21
    run.save()
    steps = [int(path.stem[-8:]) for path in sorted(tmp_path.glob("state-*"))]
    assert steps == [21, 25], "what nobody can read does not count"


def test_other_settings_and_another_model_are_refused(tmp_path):
    named = {"w": nn.Parameter(torch.zeros(2, 2))}
    optimizer = MuonAdamW({}, named)
    Run(tmp_path, named, optimizer, EMA(named), {"lr": 1e-3, "new": 1}).save()
    assert Run(tmp_path, named, optimizer, EMA(named), {"lr": 1e-3, "other": 2}).done == 0
    with pytest.raises(ValueError, match="expected lr = 0.001"):
        Run(tmp_path, named, optimizer, EMA(named), {"lr": 2e-3})
    other = {"v": named["w"]}
    with pytest.raises(ValueError, match=r"got one without model.v \(2, 2\); choose"):
        Run(tmp_path, other, MuonAdamW({}, other), EMA(other))


def test_files_are_told_by_what_they_hold_and_not_by_where_they_lie(tmp_path, capsys):
    named = {"w": nn.Parameter(torch.zeros(2))}

    def begin(settings: dict) -> Run:
        return Run(tmp_path, named, MuonAdamW({}, named), EMA(named), settings)

    old = {"checkpoint": "/old/a.safetensors", "clips": "0123456789abcdef", "lr": 1}
    begin(old).save()  # as before contents were noted
    begin({"lr": 1})
    now = {"lr": 1, "content": {"checkpoint": ["12ab", "b.safetensors"], "clips": ["3", "c.csv"]}}
    begin(now).save()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "warning: " in told and "with those given now" in told
    moved = {"checkpoint": ["12ab", "elsewhere/b"], "clips": ["3", "d.csv"], "more": ["4", "e"]}
    begin(now | {"content": moved})
    assert capsys.readouterr().err == ""
    for what, where in (("checkpoint", "b.safetensors"), ("clips", "c.csv")):
        other = now["content"] | {what: ["99", where]}
        with pytest.raises(ValueError, match=f"^expected the {what} with which the run in .* was "
                           rf"begun \(then {where}\), got other content in {where}; give .*--out$"):
            begin(now | {"content": other})


def test_a_state_that_is_no_number_never_replaces_a_good_one(tmp_path):
    run, _ = toy_run(tmp_path, 10, keep=1)
    with torch.no_grad():
        run.model["0.weight"][0, 1] = float("inf")
    run.done = 11
    with pytest.raises(ValueError, match="model.0.weight after step 11; .*10.safetensors is still"):
        run.save()
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-00000010.safetensors"]


def test_what_a_kill_left_of_a_state_is_cleared_away(tmp_path):
    for name in (f".state-00000010.{'0a' * 8}.tmp.safetensors", ".tmpa1B2c3", "mine.tmp"):
        (tmp_path / name).write_bytes(b"half")
    toy_run(tmp_path, 10)
    assert {path.name for path in tmp_path.iterdir()} == {
        "state-00000010.safetensors", "log.jsonl", "mine.tmp"}


# ------------------------------------------------------------ signals and kills


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_that_is_computed(straight, tmp_path, number, capsys):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        toy_run(tmp_path, during=lambda step: step == 7 and os.kill(os.getpid(), number))
    assert stopped.value.code == 128 + number and signal.getsignal(number) is before
    assert "stopped after step 8 of 30, everything is saved" in capsys.readouterr().err
    assert same(straight[1], toy_run(tmp_path)[1])


@pytest.mark.parametrize("save_seconds", [0, 1e9])
def test_a_run_that_dies_without_a_word_loses_nothing(straight, tmp_path, save_seconds):
    """Whole processes are killed in test_recipe.py."""
    class Killed(BaseException):
        pass

    def die(step):
        if step == 17:
            raise Killed
    with pytest.raises(Killed):
        toy_run(tmp_path, 30, save_seconds, during=die)
    assert bool(list(tmp_path.glob("state-*"))) == (save_seconds == 0)
    assert same(straight[1], toy_run(tmp_path)[1])


# ------------------------------------------------------------ log, averages, bad numbers


def test_the_log_goes_on_where_the_state_is_and_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    run, _ = toy_run(tmp_path, 10)
    run.seconds = 1000.0
    run.save()
    log = tmp_path / "log.jsonl"
    first = log.read_text()
    log.write_text(first + '{"step": 20, "seconds": 1.0}\n{"step": 9, "sec')
    run, _ = toy_run(tmp_path, 20)
    lines = log.read_text().splitlines(keepends=True)
    assert lines[0] == first and [json.loads(line)["step"] for line in lines] == [10, 20]
    assert json.loads(first).keys() >= {"loss", "samples_per_second", "memory_gb"}
    assert run.seconds > 1000, "over all commands"


def test_averaged_weights_are_in_the_model_only_inside(tmp_path):
    run, weights = toy_run(tmp_path)
    with pytest.raises(RuntimeError, match="inside"), run.ema_weights():
        assert same(run.ema.shadow, run.model)
        assert not torch.equal(run.model["0.weight"], weights["0.weight"])
        raise RuntimeError("inside")
    assert same(weights, run.model), "also after an error"


def test_a_loss_or_gradient_that_is_no_number_stops_before_a_weight_moves(tmp_path):
    w = nn.Parameter(torch.zeros(3))
    run = Run(tmp_path, {"w": w}, MuonAdamW({}, {"w": w}), EMA({}))
    descend(run, 3, 1e6 * (w - 1).square().sum(), 0.5, "clips [5]")
    moved = w.detach().clone()
    assert moved == pytest.approx(0.5 * run.optimizer.lr_other) and w.grad is None
    root = (w - w.detach()).abs().sqrt().sum()  # the root of |x - x| is 0 and has no derivative
    for loss, name in (((w * float("nan")).sum(), "loss"), (w.sum() + root, "gradient")):
        with pytest.raises(ValueError, match=rf"nan for the {name} at step 4, clips \[5\]; "):
            descend(run, 4, loss, 1.0, "clips [5]")
        assert torch.equal(w, moved)
        w.grad = None
    check_finite(1, {"a": 0.0, "b": -3e38}, "")


def test_gradients_are_clipped_to_a_norm_of_one(tmp_path):
    w = nn.Parameter(torch.zeros(2))
    run, seen = Run(tmp_path, {"w": w}, MuonAdamW({}, {"w": w}), EMA({})), []
    run.optimizer.step = lambda factor: seen.append(w.grad.clone())
    descend(run, 0, 3 * w[0] + 4 * w[1], 1.0, "")
    assert seen[0].tolist() == pytest.approx([0.6, 0.8])
