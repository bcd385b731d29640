"""Several processes are one training: two, sharded or in copies, end where one ends.

The clips are those of test_recipe.py with faces in every second row, so that no process's mean is
everybody's mean. Hardware: CPU with two processes over gloo, about 20 seconds.
Run: python -m pytest tests/test_workers.py
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_recipe import ROOT, bench, command, log_of, words  # noqa: F401  (bench is a fixture)
from torch import nn

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

# What both processes run: some facts about sums and shards, then train.py with one command line
# after the other, so that Python and torch start only once.
SEVERAL = """
import json, sys
sys.path[:0] = [{root!r}]
import torch
from torch import nn
from torch.distributed.tensor import DTensor
import train
from training import workers
from training.workers import (all_reduce, average_gradients, can_shard, choose_precision,
                              full_tensor, gather, like, put, shard, start_workers)
rank, world = start_workers()
workers.bf16_time = lambda: [0.5, 50.0][rank]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 4))
before = {{k: v.detach().clone() for k, v in model.named_parameters()}}
shard(model, "cpu")
named = dict(model.named_parameters())
held = {{k: p.to_local().numel() for k, p in named.items()}}
together = all(torch.equal(full_tensor(p.detach()), before[k]) for k, p in named.items())
kept = {{k: gather(p) for k, p in named.items()}}
first = named["0.weight"]
put(first, before["0.weight"] + 1)
moved = (full_tensor(first.detach()) - before["0.weight"] - 1).abs().max().item()
cut = like(before["0.weight"], first)
odd, given = nn.Parameter(torch.zeros(2)), torch.tensor([1.0 + rank, 10.0])
if rank == 0:
    odd.grad = torch.tensor([4.0, 8.0])
first.grad = first.detach() * 0 + 3.0
average_gradients([first, odd], world)
facts = {{"rank": rank, "world": world, "shard": can_shard(), "held": held, "together": together,
         "moved": moved, "sum": all_reduce(given).tolist(), "given": given.tolist(),
         "cut": isinstance(cut, DTensor) and torch.equal(full_tensor(cut), before["0.weight"]),
         "kept": [torch.equal(kept[k], before[k]) or kept[k].numel() for k in kept],
         "precision": choose_precision(None, "cpu"),
         "gradient": odd.grad.tolist(), "sharded": full_tensor(first.grad).unique().tolist()}}
open(f"{folder}/{{rank}}.json", "w").write(json.dumps(facts))
for arguments in json.loads({runs!r}):
    sys.argv = ["train.py", *arguments]
    assert train.main() == 0, arguments
torch.distributed.destroy_process_group()
"""


def two_processes(script: Path) -> None:
    """What torchrun does, without its own start; raises with what they said when one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
              "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)]
    try:
        told = [process.communicate(timeout=180)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(told)


def state(out: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_state(out / f"state-{step:08d}.safetensors")[0]


def differences(out: Path, other: Path) -> dict[str, float]:
    """Largest absolute difference of each part of the final state, and of the logged losses."""
    a, b = state(out), state(other)
    assert a.keys() == b.keys() and all(a[k].shape == b[k].shape for k in a), "whole tensors"
    found = {part: max((a[k] - b[k]).abs().max().item() for k in a if k.startswith(part))
             for part in ("model.", "ema.", "adam.")}
    lines = list(zip(log_of(out), log_of(other), strict=True))
    assert [x["step"] for x, _ in lines] == [y["step"] for _, y in lines] == [10, 20]
    for name in ("loss", "fm", "face", "id", "gradient", "with_face", "with_id"):
        found[name] = max(abs(x[name] - y[name]) for x, y in lines)
    return found


@pytest.fixture(scope="module")
def runs(bench, tmp_path_factory):  # noqa: F811
    """Folder with the run of each name; all see the same four clips in every step.

    one: one process, batch 4; accumulated: one process, 2 + 2; sharded, copied: two processes, 2
    each. The last two change hands after ten steps.
    """
    folder = tmp_path_factory.mktemp("runs")

    def arguments(name: str, *more: object) -> list[str]:
        return words(bench, folder / name, "--steps", STEPS, "--lr", "1e-2",
                     "--final-lr", 1, *more, manifest="some-faces")

    alone, half, stop = ("--batch", 4), ("--batch", 2), ("--steps", STEPS // 2)
    assert command(arguments("one", *alone, *stop)) == 0
    shutil.copytree(folder / "one", folder / "one, then two")
    assert command(arguments("one", *alone)) == 0
    assert command(arguments("accumulated", *half, "--accumulate", 2)) == 0
    several = [arguments("sharded", *half), arguments("copied", *half, "--parallel", "ddp"),
               arguments("one, then two", *half), arguments("two, then one", *half, *stop)]
    script = folder / "several.py"
    script.write_text(SEVERAL.format(root=str(ROOT), folder=folder, runs=json.dumps(several)))
    two_processes(script)
    assert command(arguments("two, then one", *alone)) == 0
    return folder


NAMES = ["accumulated", "sharded", "copied", "one, then two", "two, then one"]


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_weights_after_twenty_steps_equal_those_of_one_process(runs, name):
    """1e-5: float32 sums in another order, which Adam enlarges where a gradient is nearly 0."""
    found = differences(runs / "one", runs / name)
    assert max(found.values()) <= BOUND, found


def test_the_comparison_means_something(runs):
    """Weights have moved by far more than the bound, and every term was at work in some steps."""
    now, before = state(runs / "one"), state(runs / "one, then two", 10)
    moved = max((now[k] - before[k]).abs().max().item() for k in now if k.startswith("model."))
    assert moved > 200 * BOUND
    last = log_of(runs / "one")[-1]
    assert 0 < last["with_id"] < last["with_face"] < 1 and min(last["face"], last["id"]) > 0


def test_every_process_holds_half_and_sums_and_averages_run_over_all(runs):
    facts = [json.loads((runs / f"{rank}.json").read_text()) for rank in range(2)]
    assert [(f["rank"], f["world"], f["shard"]) for f in facts] == [(0, 2, True), (1, 2, True)]
    half = {"0.weight": 12, "0.bias": 4, "1.weight": 16, "1.bias": 2}
    for found in facts:
        assert found["held"] == half, "of 24, 8, 32 and 4"
        assert found["together"] and found["cut"] and found["moved"] < 1e-6
        assert found["sum"] == [3, 20] and found["given"] == [1 + found["rank"], 10], "left alone"
        assert found["kept"] == [0 if found["rank"] else True] * 4, "whole for rank 0, and nobody"
        assert found["precision"] == "bf16", "rank 0 decides, whatever the others measure"
        assert found["gradient"] == [2, 4], "a missing gradient counts as zero"
        assert found["sharded"] == [3], "fully_shard has averaged these already"


def test_alone_everything_returns_at_once_and_changes_nothing(monkeypatch):
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    x = torch.randn(3, 2)
    assert start_workers() == (0, 1) and not can_shard() and wait() is None
    assert full_tensor(x) is x and torch.equal(like(x, torch.zeros(3, 2)), x)
    assert torch.equal(all_reduce(x), x)
    target = torch.zeros(3, 2, dtype=torch.float64)
    put(target, x)
    assert torch.equal(target, x.double())
    with_grad, without = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with_grad.grad = torch.tensor([1.0, 2.0])
    average_gradients([with_grad, without], 1)
    assert with_grad.grad.tolist() == [1, 2] and without.grad.tolist() == [0, 0]
