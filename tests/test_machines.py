"""What differs between machines: number types, operations, devices, systems, threads.

Other machines are stood in for: a processor without bf16 units by oneDNN's own switch, Apple's GPU,
which has no float64, by PyTorch's "meta" device, Windows by taking away what Python lacks there.
Hardware: CPU, some seconds. Run: python -m pytest tests/test_machines.py
"""

import ast
import builtins
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_house import NAMES, TREES
from test_recipe import bench, log_of, words  # noqa: F401  (bench is a fixture)
from tiny import SIZES, VAE, config
from torch.utils._python_dispatch import TorchDispatchMode

import train
from common.cli import find_device
from ltx.load import check_memory, machine_memory
from ltx.options import build_parser, resolve_machine
from ltx.vae import VideoVAE
from model import VideoTransformer
from rope import Layout
from study import evaluate
from toy import pretrain
from training import run, workers

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------ bf16 or float32


def test_a_processor_without_bf16_units_is_found_out_even_under_autocast():
    """As most laptops are: oneDNN may use what AVX2 has, and no more."""
    code = ("import torch; from ltx.fast_cpu import bf16_time\n"
            "with torch.autocast('cpu', torch.bfloat16): print(bf16_time())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert float(done.stdout) > 2, done.stderr


@pytest.mark.parametrize("asked, device, ratio, chosen, line", [
    (None, "cpu", 0.4, "bf16", "precision bf16: a matrix product in bf16 takes 0.4 times as long"),
    (None, "cpu", 34, "fp32", "precision fp32: a matrix product in bf16 takes 34 times as long"),
    ("bf16", "cpu", 34, "bf16", ""), (None, "cuda", 34, "bf16", ""), (None, "mps", 0.4, "fp32", ""),
])
def test_a_cpu_computes_in_what_it_is_faster_in_and_says_so(
        asked, device, ratio, chosen, line, monkeypatch, capsys):
    monkeypatch.setattr(workers, "bf16_time", lambda: ratio)
    assert workers.choose_precision(asked, device) == chosen
    told = capsys.readouterr().out
    assert told.startswith(line) and told.count("\n") == bool(line)


def test_a_run_keeps_the_precision_that_it_was_begun_in(bench, tmp_path, monkeypatch):  # noqa: F811
    def go(steps: int, ratio: float) -> dict:
        monkeypatch.setattr(workers, "bf16_time", lambda: ratio)
        given = words(bench, tmp_path, "--steps", steps, "--validate-every", 99)
        at = given.index("--precision")
        assert train.main(given[:at] + given[at + 2:]) == 0
        return run.begun_with(tmp_path)
    assert go(1, 34)["precision"] == go(2, 0.4)["precision"] == "fp32"
    assert run.begun_with(tmp_path / "new") == {}
    assert log_of(tmp_path)[-1]["step"] == 2


# ------------------------------------------------------------ devices


def test_apples_gpu_is_used_when_asked_for_in_float32_and_nothing_else_is_promised(
        monkeypatch, capsys):
    there = {"cuda": False, "mps": True}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there["cuda"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there["mps"])
    assert (find_device(), find_device("mps"), find_device("cpu")) == ("cpu", "mps", "cpu")
    args = build_parser().parse_args(["--device", "mps"])
    resolve_machine(args)
    assert (args.device, args.torch_dtype) == ("mps", torch.float32)
    args.quantization = "fp8-cast"
    with pytest.raises(ValueError, match="expected --quantization none on mps.*; leave it out"):
        resolve_machine(args)
    there |= {"cuda": True, "mps": False}
    assert find_device() == "cuda"
    with pytest.raises(ValueError, match="expected a device for mps .*, got none; use --device"):
        find_device("mps")


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.is_meta:
                assert x.dtype != torch.float64, func
        return out


@torch.no_grad()
def test_nothing_on_the_device_is_float64(monkeypatch):
    def unique(x, return_inverse):  # "meta" knows no numbers: each token has a level of its own
        return x.flatten(), torch.arange(x.numel(), device=x.device).view(x.shape)
    monkeypatch.setattr(torch, "unique", unique)
    with torch.device("meta"):
        model, vae = VideoTransformer(SIZES), VideoVAE(VAE)
        video, noise, sigma = torch.zeros(1, 3, 9, 32, 32), torch.zeros(1, 48, 16), torch.zeros(1)
        context = torch.zeros(1, 4, SIZES.dim)
    positions = Layout(3, 4, 4, 8.0, 4, 8).video_positions()[None].to("meta")
    with NoFloat64():
        assert model(noise, sigma[:, None].expand(1, 48), sigma, positions, context).is_meta
        assert vae.decode(vae.encode(video)).is_meta


def test_a_process_knows_its_card_before_anything_is_put_there(tmp_path, monkeypatch):
    order = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain, "start_workers", lambda: order.append("card"))
    monkeypatch.setitem(pretrain.STAGES, "vae", (lambda args, device: order.append("stage"), 1, 2))
    monkeypatch.setattr(workers, "bf16_time", lambda: order.append("precision") or 2.0)
    assert pretrain.main(["vae"]) == 0 and order == ["card", "precision", "stage"]


@pytest.mark.parametrize("command, given", [(train.main, []), (pretrain.main, ["export"])])
def test_the_number_of_threads_is_left_as_it_is(command, given, tmp_path, monkeypatch):
    """PyTorch reads OMP_NUM_THREADS, and torchrun sets it. Both commands end for want of a file."""
    def missing(*args):
        raise ValueError("expected a VAE, got none; make one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.VideoVAE, "load", missing)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert command(given) == 2 and torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------ Windows


UNIX = {"sysconf", "fork", "posix_fallocate", "getuid", "geteuid", "mkfifo", "killpg", "setsid",
        "sched_getaffinity", "SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "alarm", "setitimer"}
MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog"}


@pytest.mark.parametrize("name", NAMES)
def test_what_only_unix_has_is_asked_for_first(name):
    """os.sysconf below hasattr(os, "sysconf"), `import resource` within a try."""
    tree = TREES[name]
    tried = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try)
             for inner in ast.walk(node)}
    asked = {node.args[1].value for node in ast.walk(tree) if isinstance(node, ast.Call)
             and isinstance(node.func, ast.Name) and node.func.id == "hasattr"
             and isinstance(node.args[1], ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) \
                and node.value.id in ("os", "signal"):
            assert node.attr not in UNIX - asked, f"line {node.lineno}"
        if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in tried:
            names = {node.module} if isinstance(node, ast.ImportFrom) else {
                alias.name for alias in node.names}
            assert not names & MODULES, f"line {node.lineno}"


def test_without_resource_and_sysconf_memory_is_unknown_and_nothing_is_refused(monkeypatch):
    plain, here = builtins.__import__, machine_memory()

    def without(name, *rest):
        if name == "resource":
            raise ImportError(name)
        return plain(name, *rest)
    assert 1e8 < here < 1e15 and run.memory_gb() > 0.01
    args = evaluate.parse_arguments(["--people", "1000000"])
    with pytest.raises(ValueError, match="expected as many clips as fit into"):
        evaluate.check_numbers(args)
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(builtins, "__import__", without)
    assert run.memory_gb() == 0 and machine_memory() == float("inf")
    evaluate.check_numbers(args)
    huge = Layout(9999, 999, 999, 8.0, 4, 8)
    check_memory(config(), VideoVAE(VAE), huge, torch.float32, "cpu")
