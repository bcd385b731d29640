"""A frozen list of one-line faults, and whether the tests notice each of them.

A suite is worth what it catches. Every row of MUTANTS is a mistake that somebody could make in one line; the command
makes it in a copy of the repository, runs the tests that should notice, and prints which one did. A fault that
survives is a hole in the suite: write the test, do not touch the row. Not collected by pytest: it takes minutes.

    python tests/mutants.py                 all of them, two at a time
    python tests/mutants.py rope losses     those whose file or text contains a word
    python tests/mutants.py --check         only that every row still fits its file

Hardware: CPU. Run it after deleting or rewriting a test.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300  # seconds for the tests of one fault; one that hangs is noticed, too


class Mutant(NamedTuple):
    file: str
    before: str  # stands exactly once in the file
    after: str
    tests: str   # what pytest is given: files, or single tests, separated by blanks


MUTANTS: list[Mutant] = [
    # training, toy
    Mutant("training/optim.py", "m.lerp_(p.grad, 0.05)", "m.lerp_(p.grad, 1.0)",
           "tests/test_optim.py"),
    Mutant("training/optim.py", "factor * 0.2 * max(update.shape)",
           "factor * 0.2 * min(update.shape)", "tests/test_optim.py"),
    Mutant("training/optim.py", 'group["lr"] = self.lr_other * factor',
           'group["lr"] = self.lr_other', "tests/test_optim.py"),
    Mutant("training/optim.py", "if p.ndim >= 2 and", "if p.ndim == 2 and", "tests/test_optim.py"),
    Mutant("training/optim.py", "(step + 1) / max(1, warmup)", "step / max(1, warmup)",
           "tests/test_optim.py"),
    Mutant("training/optim.py", "max(1.0, decay * steps)", "max(1.0, steps)",
           "tests/test_optim.py"),
    Mutant("training/optim.py", "weight = 1 - min(self.decay", "weight = min(self.decay",
           "tests/test_optim.py"),
    Mutant("training/optim.py", "x = x / (x.norm() + 1e-7)", "x = x / (x.abs().max() + 1e-7)",
           "tests/test_optim.py"),
    Mutant("training/workers.py", "(flat / world).split", "flat.split", "tests/test_workers.py"),
    Mutant("training/workers.py", "p.grad = torch.zeros_like(p)", "p.grad = torch.ones_like(p)",
           "tests/test_workers.py"),
    Mutant("training/workers.py", "for p in parameters if not is_shard(p)]",
           "for p in parameters]", "tests/test_workers.py"),
    Mutant("training/workers.py", "values.to(device_name(), copy=True)",
           "values.to(device_name())", "tests/test_workers.py"),
    Mutant("training/run.py", "self.settings[key] != old", "self.settings[key] == old",
           "tests/test_run.py"),
    Mutant("training/run.py", "state.stem <= path.stem][self.keep:]", "state.stem][self.keep:]",
           "tests/test_run.py"),
    Mutant("training/run.py", "if not tensor.isfinite().all():", "if tensor.isnan().all():",
           "tests/test_run.py"),
    Mutant("training/run.py", "sweep(self.folder)", "pass", "tests/test_run.py"),
    Mutant("training/run.py", 'json.loads(line)["step"] <= self.done',
           'json.loads(line)["step"] <= self.done + 10', "tests/test_run.py"),
    Mutant("training/run.py", "now = {k: p.detach().clone()", "now = {k: p.detach()",
           "tests/test_run.py"),
    Mutant("training/run.py", "self.seconds = before + time.time() - start",
           "self.seconds = time.time() - start", "tests/test_run.py"),
    Mutant("training/run.py", "sys.exit(128 + self.signal)", "sys.exit(self.signal)",
           "tests/test_run.py"),
    Mutant("training/run.py", "self.optimizer.load(tensors)", "pass", "tests/test_run.py"),
    Mutant("training/run.py", "clip_grad_norm_(parameters, 1.0)",
           "clip_grad_norm_(parameters, 1e9)", "tests/test_run.py"),
    Mutant("training/run.py", "    run.optimizer.step(factor)", "    run.optimizer.step()",
           "tests/test_run.py"),
    Mutant("training/run.py", "        if not math.isfinite(value):", "        if value > 1e30:",
           "tests/test_run.py"),
    Mutant("training/plot.py", "low <= (t := k * head * up / down)",
           "low <= (t := k * (head * up / down))", "tests/test_plot.py"),
    Mutant("training/plot.py", "        elif out[-1]:", "        elif not out:",
           "tests/test_plot.py"),
    Mutant("training/plot.py", "[max(n, default=None) for n in numbers]",
           "[min(n, default=None) for n in numbers]", "tests/test_plot.py"),
    Mutant("training/plot.py", "for row in rows if key in row}",
           "for row in rows[::-1] if key in row}", "tests/test_plot.py"),
    Mutant("training/plot.py", "min(ends) > 0 and max(ends)", "max(ends)", "tests/test_plot.py"),
    Mutant("training/plot.py", "if number == len(lines):", "if number <= len(lines):",
           "tests/test_plot.py"),
    Mutant("training/plot.py", "if len(set(names)) < len(names):", "if not names:",
           "tests/test_plot.py"),
    Mutant("training/plot.py", "math.log10(value) if self.log else value", "value",
           "tests/test_plot.py"),
    Mutant("training/validate.py", "sums += found * values", "sums += values",
           "tests/test_validate.py"),
    Mutant("training/validate.py", "seeded(12, look, i)", "seeded(12, i)",
           "tests/test_validate.py"),
    Mutant("training/validate.py", "run.log(run.done + 1, **losses)", "run.log(**losses)",
           "tests/test_validate.py"),
    Mutant("training/validate.py", "    with run.ema_weights():", "    with torch.no_grad():",
           "tests/test_validate.py"),
    Mutant("training/validate.py", "generators = [seeded(13, i) for i in indices]",
           "generators = [seeded(13) for i in indices]", "tests/test_validate.py"),
    Mutant("toy/world.py", 'does["moves to the right"] - does["moves to the left"]',
           'does["moves to the left"] - does["moves to the right"]', "tests/test_world.py"),
    Mutant("toy/world.py", "ex, ey = x - a * torch.sin(angle)",
           "ex, ey = x + a * torch.sin(angle)", "tests/test_world.py"),
    Mutant("toy/world.py", "other[:, :LOOK_ALIKE_TRAITS] = person[:, :LOOK_ALIKE_TRAITS]",
           "other[:, LOOK_ALIKE_TRAITS:] = person[:, LOOK_ALIKE_TRAITS:]", "tests/test_world.py"),
    Mutant("toy/world.py", ".to(person.device) < share", ".to(person.device) > share",
           "tests/test_world.py"),
    Mutant("toy/world.py", "light=LIGHT_NAMES[light]", "light=LIGHT_NAMES[scene % 5]",
           "tests/test_world.py"),
    Mutant("toy/world.py", "px + 1.1 * a, py - 0.03 + 1.1 * b]", "px + a, py - 0.03 + b]",
           "tests/test_world.py"),
    Mutant("toy/world.py", "(down[:, :, :, None] & across[:, :, None])",
           "(down[:, :, None] & across[:, :, :, None])", "tests/test_world.py"),
    Mutant("toy/world.py", "manual_seed(SPLIT_SEEDS[split])", 'manual_seed(SPLIT_SEEDS["val"])',
           "tests/test_world.py"),
    Mutant("toy/config.py", "(FRAMES - 1) // 4 + 1", "FRAMES // 4",
           "tests/test_pretrain.py::test_the_bundled_checkpoint_has_these_tables"),
    Mutant("toy/config.py", "theta=100.0", "theta=10000.0",
           "tests/test_pretrain.py::test_the_bundled_checkpoint_has_these_tables"),
    Mutant("toy/config.py", '"guide_every": 2', '"guide_every": 1',
           "tests/test_pretrain.py::test_the_bundled_checkpoint_has_these_tables"),
    Mutant("toy/pretrain.py", 'if maps["boxes"][stop - 1].any():', 'if maps["boxes"].any():',
           "tests/test_pretrain.py::test_rendering_goes_on_where_it_was_stopped"),
    Mutant("toy/pretrain.py", "    if needed > free:", "    if free == 0:",
           "tests/test_pretrain.py::test_a_map_larger_than_the_disk_is_refused"),
    Mutant("toy/pretrain.py", "((1 + 2 * mask) * error).mean(dim=clip)",
           "((1 + 2 * mask) * error).sum(dim=clip)",
           "tests/test_pretrain.py::test_a_face_counts_three_times_in_the_vae_loss"),
    Mutant("toy/pretrain.py", "noise, (1 - s) * x0 + s * noise", "noise, s * x0 + (1 - s) * noise",
           "tests/test_pretrain.py::test_the_noisy_latent_follows_the_noise_level"),
    Mutant("toy/pretrain.py", '"std-of-means").copy_(z.std(dim=(0, 2, 3, 4)))',
           '"std-of-means").copy_(z.var(dim=(0, 2, 3, 4)))', "tests/test_pretrain.py"),
    Mutant("toy/pretrain.py", '        learning = nn.ModuleDict({"transformer": model})',
           "        pass", "tests/test_pretrain.py"),
    Mutant("toy/pretrain.py", "if not far < 0.1:", "if not far < 10:", "tests/test_pretrain.py"),
    Mutant("toy/pretrain.py", 'if args.keep_text else RUNS / "vae.safetensors"',
           'if not args.keep_text else RUNS / "vae.safetensors"', "tests/test_pretrain.py"),
    Mutant("toy/pretrain.py", 'if key in ("reference_placement", "training_steps")',
           'if key in ("training_steps",)', "tests/test_pretrain.py"),
    Mutant("toy/pretrain.py", "dB.quantile(0.01).item() - 1", "dB.quantile(0.99).item() - 1",
           "tests/test_pretrain.py::test_the_bundled_checkpoint_has_these_tables"),
    Mutant("toy/recognisers.py", "nnf.cross_entropy(scores.T, target)",
           "nnf.cross_entropy(scores, target)", "tests/test_recognisers.py"),
    Mutant("toy/recognisers.py", "pose = poses[torch.arange(B, device=person.device), moment]",
           "pose = poses[torch.arange(B, device=person.device), 0]", "tests/test_recognisers.py"),
    Mutant("toy/recognisers.py", "(a * b).sum(1) > (a * other).sum(1)",
           "(a * b).sum(1) < (a * other).sum(1)", "tests/test_recognisers.py"),
    Mutant("toy/recognisers.py", "0.10 * u[1] * noise", "0.10 * noise",
           "tests/test_recognisers.py"),
    Mutant("toy/head.py", "(error * present).sum() / present.sum()", "error.mean()",
           "tests/test_head.py"),
    Mutant("toy/head.py", "place % 4 != 3, place % 8 < 4", "place % 4 == 3, place % 8 < 4",
           "tests/test_head.py"),
    Mutant("toy/head.py", "torch.where(u[0] < 1 / 3, u[1], pose[:, 5])",
           "torch.where(u[0] < 1 / 3, pose[:, 5], u[1])", "tests/test_head.py"),
    Mutant("toy/head.py", "torch.stack(ways)[place % len(ways), place]",
           "torch.stack(ways)[place % 1, place]", "tests/test_head.py"),
    Mutant("toy/head.py", "video.transpose(1, 2).flatten(0, 1)",
           "video.transpose(0, 2).transpose(1, 2).flatten(0, 1)", "tests/test_head.py"),
]


def misfit(mutant: Mutant) -> str:
    """What is wrong with a row, or nothing."""
    path = ROOT / mutant.file
    if not path.exists():
        return f"{mutant.file} does not exist"
    count = path.read_text(encoding="utf-8").count(mutant.before)
    if count != 1:
        return f"{mutant.before!r} stands {count} times in {mutant.file}"
    gone = [t for t in mutant.tests.split() if not (ROOT / t.partition("::")[0]).exists()]
    return f"no such test file: {gone[0]}" if gone else ""


def killer(mutant: Mutant) -> str:
    """The test that noticed, or "" when the fault survived."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for path in ROOT.iterdir():
            if path.name in ("weights", "examples", "docs"):
                (folder / path.name).symlink_to(path)
            elif path.is_dir() and not path.name.startswith(".") and path.name not in ("runs", "data"):
                shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif path.is_file():
                shutil.copy(path, folder)
        target = folder / mutant.file
        text = target.read_text(encoding="utf-8")
        target.write_text(text.replace(mutant.before, mutant.after), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider",
                   *mutant.tests.split()]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=LIMIT,
                                  env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
        except subprocess.TimeoutExpired:
            return f"(over {LIMIT} s)"
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    if done.returncode not in (0, 1, 2) or (done.returncode and not found):
        return f"(pytest ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-200:]!r})"
    return found[1] if found else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only rows whose file, text or tests contain one of them")
    parser.add_argument("--check", action="store_true", help="run nothing, see whether the rows fit the files")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.words or any(w in " ".join(m) for w in args.words)]
    if wrong := [told for m in chosen if (told := misfit(m))]:
        print(*wrong, sep="\n")
        return 2
    if args.check:
        print(f"{len(chosen)} faults fit their files")
        return 0
    start, survived = time.time(), 0
    print("| file | instead of | stands | noticed by |\n|---|---|---|---|")
    with ThreadPoolExecutor(args.jobs) as pool:
        for mutant, test in zip(chosen, pool.map(killer, chosen), strict=True):
            survived += not test
            cells = (" ".join(text.split()).replace("|", "/") for text in mutant[1:3])
            print(f"| {mutant.file} | `" + "` | `".join(cells) + f"` | {test or 'NOBODY'} |", flush=True)
    print(f"\n{len(chosen)} faults, {len(chosen) - survived} killed, {survived} survived, {time.time() - start:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
