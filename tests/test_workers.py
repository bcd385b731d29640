"""Several processes are one training: two, sharded or in copies, end where one ends, and states move between them.

The clips are those of test_recipe.py with faces in every second row, so that no process's mean is everybody's mean.

Hardware: CPU with two processes over gloo, about half a minute. Run: python -m pytest tests/test_workers.py
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_recipe import ROOT, bench, command, log_of, words  # noqa: F401  (bench is a fixture)
from torch import nn

from training.optim import schedule
from training.run import load_state
from training.workers import (
    all_reduce,
    average_gradients,
    can_shard,
    full_tensor,
    like,
    put,
    start_workers,
    wait,
)

STEPS, BOUND = 20, 1e-5

# What torchrun starts twice: some facts about sums and shards, then train.py with one command line after the other, so
# that Python and torch start only once.
SEVERAL = """
import json, sys
sys.path[:0] = [{root!r}]
import torch
from torch import nn
from torch.distributed.tensor import DTensor
import train
from training.workers import (
    average_gradients,
    can_shard,
    like,
    put,
    shard,
    start_workers,
    all_reduce,
    full_tensor,
)
rank, world = start_workers()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 4))
before = {{k: v.detach().clone() for k, v in model.named_parameters()}}
shard(model, "cpu")
named = dict(model.named_parameters())
held = {{k: p.to_local().numel() for k, p in named.items()}}
together = all(torch.equal(full_tensor(p.detach()), before[k]) for k, p in named.items())
put(named["0.weight"], before["0.weight"] + 1)
moved = (full_tensor(named["0.weight"].detach()) - before["0.weight"] - 1).abs().max().item()
cut = like(before["0.weight"], named["0.weight"])
odd, given = nn.Parameter(torch.zeros(2)), torch.tensor([1.0 + rank, 10.0])
if rank == 0:
    odd.grad = torch.tensor([4.0, 8.0])
average_gradients([odd], world)
facts = {{"rank": rank, "world": world, "shard": can_shard(), "held": held, "together": together, "moved": moved,
         "cut": isinstance(cut, DTensor) and torch.equal(full_tensor(cut), before["0.weight"]),
         "sum": all_reduce(given).tolist(), "given": given.tolist(), "gradient": odd.grad.tolist()}}
open(f"{folder}/{{rank}}.json", "w").write(json.dumps(facts))
for arguments in json.loads({runs!r}):
    sys.argv = ["train.py", *arguments]
    assert train.main() == 0, arguments
torch.distributed.destroy_process_group()
"""


def torchrun(arguments: list[str]) -> None:
    """Two processes with gloo; raises with what they said when one fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr


def state(out: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_state(out / f"state-{step:08d}.safetensors")[0]


def differences(out: Path, other: Path) -> dict[str, float]:
    """Largest absolute difference of each part of the final state, and of the logged losses."""
    a, b = state(out), state(other)
    assert a.keys() == b.keys()
    found = {part: max((a[k] - b[k]).abs().max().item() for k in a if k.startswith(part))
             for part in ("model.", "ema.", "adam.")}
    lines = list(zip(log_of(out), log_of(other), strict=True))
    for name in ("loss", "fm", "face", "id", "gradient", "with_face", "with_id"):
        assert [x["step"] for x, _ in lines] == [y["step"] for _, y in lines] == [10, 20]
        found[name] = max(abs(x[name] - y[name]) for x, y in lines)
    return found


@pytest.fixture(scope="module")
def runs(bench, tmp_path_factory):  # noqa: F811
    """Folder with the run of each name; all see the same four clips in every step.

    one: one process, batch 4; accumulated: one process, 2 + 2; sharded, copied: two processes, 2 each. The last two
    change hands after ten steps. A constant rate, because a run does not know that it will be stopped.
    """
    folder = tmp_path_factory.mktemp("runs")

    def arguments(name: str, steps: int, *more: object) -> list[str]:
        return words(bench, folder / name, "--steps", steps, "--final-lr", 1, *more, manifest="some-faces")

    alone, half = ("--batch", 4), ("--batch", 2)
    assert command(arguments("one", 10, *alone)) == 0
    shutil.copytree(folder / "one", folder / "one, then two")
    assert command(arguments("one", STEPS, *alone)) == 0
    assert command(arguments("accumulated", STEPS, *half, "--accumulate", 2)) == 0
    several = [arguments("sharded", STEPS, *half), arguments("copied", STEPS, *half, "--parallel", "ddp"),
               arguments("one, then two", STEPS, *half), arguments("two, then one", 10, *half)]
    script = folder / "several.py"
    script.write_text(SEVERAL.format(root=str(ROOT), folder=folder, runs=json.dumps(several)))
    torchrun([str(script)])
    assert command(arguments("two, then one", STEPS, *alone)) == 0
    return folder


@pytest.mark.parametrize("name", ["accumulated", "sharded", "copied", "one, then two", "two, then one"])
def test_losses_and_weights_after_twenty_steps_equal_those_of_one_process(runs, name):
    """1e-5, absolute: float32 sums in another order, which Adam enlarges where a gradient is nearly 0."""
    found = differences(runs / "one", runs / name)
    print(f"{name:15s}", "  ".join(f"{part} {value:.1e}" for part, value in found.items()))
    assert max(found.values()) <= BOUND, found


def test_the_comparison_means_something(runs):
    """Weights have moved by far more than the bound, and every term was at work in some steps and not in others."""
    now, before = state(runs / "one"), state(runs / "one, then two", 10)
    moved = max((now[k] - before[k]).abs().max().item() for k in now if k.startswith("model."))
    print(f"moved by {moved:.1e} in the last ten steps")
    assert moved > 200 * BOUND
    last = log_of(runs / "one")[-1]
    assert 0 < last["with_id"] < last["with_face"] < 1 and min(last["face"], last["id"]) > 0


def test_two_processes_hold_half_of_each_sharded_weight_and_share_the_log(runs):
    """The state that rank 0 wrote holds whole tensors all the same, and the log has one line for each ten steps."""
    whole_ones, sharded = state(runs / "one"), state(runs / "sharded")
    assert all(whole_ones[k].shape == sharded[k].shape for k in whole_ones)
    assert [line["step"] for line in log_of(runs / "sharded")] == [10, 20]
    assert {path.name for path in (runs / "sharded").iterdir()} == {path.name for path in (runs / "copied").iterdir()}


def test_every_process_holds_half_and_sums_and_averages_run_over_all(runs):
    facts = [json.loads((runs / f"{rank}.json").read_text()) for rank in range(2)]
    assert [(f["rank"], f["world"], f["shard"]) for f in facts] == [(0, 2, True), (1, 2, True)]
    for found in facts:
        assert found["held"] == {"0.weight": 12, "0.bias": 4, "1.weight": 16, "1.bias": 2}, "half of 24, 8, 32 and 4"
        assert found["together"] and found["cut"] and found["moved"] < 1e-6
        assert found["sum"] == [3, 20] and found["given"] == [1 + found["rank"], 10], "the values given are left alone"
        assert found["gradient"] == [2, 4], "a missing gradient counts as zero"


# ------------------------------------------------------------ alone


def test_alone_everything_returns_at_once_and_changes_nothing(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    x = torch.randn(3, 2)
    assert start_workers() == (0, 1) and not can_shard() and wait() is None
    assert full_tensor(x) is x and torch.equal(like(x, torch.zeros(3, 2)), x) and torch.equal(all_reduce(x), x)
    target = torch.zeros(3, 2, dtype=torch.float64)
    put(target, x)
    assert torch.equal(target, x.double())
    with_grad, without = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with_grad.grad = torch.tensor([1.0, 2.0])
    average_gradients([with_grad, without], 1)
    assert with_grad.grad.tolist() == [1, 2] and without.grad.tolist() == [0, 0]


# ------------------------------------------------------------ the rate over a run


def test_the_rate_warms_up_stays_and_falls_to_its_final_share():
    rates = [schedule(step, 1000, warmup=100, decay=0.5, final=0.1) for step in range(1000)]
    assert rates[0] == 0.01 and rates[49] == pytest.approx(0.5) and rates[99] == 1, "linear warm-up"
    assert all(rate == 1 for rate in rates[99:501]) and rates[501] < 1, "flat until half of the run is left"
    assert rates[750] == pytest.approx(0.55), "halfway between 1 and 0.1"
    assert 0.1 < rates[999] < 0.102 and schedule(1000, 1000, decay=0.5, final=0.1) == pytest.approx(0.1)
    falls = [a - b for a, b in zip(rates[501:], rates[502:], strict=False)]
    assert min(falls) > 0 and max(falls) == pytest.approx(min(falls), abs=1e-9), "linear"


def test_the_rate_is_constant_without_decay_and_never_above_one():
    assert {schedule(step, 100, warmup=1, final=1.0) for step in range(100)} == {1.0}
    assert {schedule(step, 100, warmup=0, decay=0.0) for step in range(100)} == {1.0}
    assert max(schedule(step, 50, warmup=100, decay=1.0) for step in range(50)) <= 0.5, "both ends of a short run count"
    assert schedule(99, 100, warmup=10, decay=1.0, final=0.0) == pytest.approx(0.01)
    assert schedule(500, 100, final=0.0) == 0, "beyond the end"
