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


LOADING, VAE, TILING = "tests/test_loading.py", "tests/test_vae.py", "tests/test_tiling.py"
OFFLOAD, PLAN, FAST_CPU = "tests/test_offload.py", "tests/test_plan.py", "tests/test_fast_cpu.py"
MUTANTS: list[Mutant] = [
    # ltx: checkpoint, wrong_file, vae, tiling, offload, plan, fast_cpu
    Mutant("ltx/checkpoint.py", "self.start = 8 + length", "self.start = length", LOADING),
    Mutant("ltx/checkpoint.py", "offset=begin - page)", "offset=0)", LOADING),
    Mutant("ltx/checkpoint.py", "else dtype or tensor.dtype", "else dtype or like.dtype", LOADING),
    Mutant("ltx/checkpoint.py", "if (found := tuple(entry.get_shape())) != shape:",
           "if len(found := tuple(entry.get_shape())) != len(shape):", LOADING),
    Mutant("ltx/checkpoint.py", "_check(file, path, wanted, prefix)\n        for", "for", LOADING),
    Mutant("ltx/checkpoint.py", "type(n) in (int, kind) and", "isinstance(n, (int, kind)) and", LOADING),
    Mutant("ltx/checkpoint.py", "(count and len(numbers) != count)", "not numbers", LOADING),
    Mutant("ltx/checkpoint.py", 'torch.device("meta")', 'torch.device("cpu")', LOADING),
    Mutant("ltx/checkpoint.py", "if name not in changed}", "if name in changed}", LOADING),
    Mutant("ltx/wrong_file.py", "if size >= whole:\n        return", "if size > whole:\n        return",
           LOADING),
    Mutant("ltx/wrong_file.py", "release < (1, 0)", "release < (0, 9)", LOADING),
    Mutant("ltx/wrong_file.py", "elder and not sound", "elder and sound", LOADING),
    Mutant("ltx/wrong_file.py", "settings.get(key, value) != value", "settings.get(key) != value",
           LOADING),
    Mutant("ltx/wrong_file.py", "not config and names and all(", "not config and names and any(",
           LOADING),
    Mutant("ltx/vae.py", "x.permute(0, 1, 3, 5, 7, 2, 4, 6)", "x.permute(0, 1, 5, 3, 7, 2, 4, 6)", VAE),
    Mutant("ltx/vae.py", "[first, first, x] if causal", "[first, x, last] if causal", VAE),
    Mutant("ltx/vae.py", "x[:, :, 1:] if self", "x[:, :, :-1] if self", VAE),
    Mutant("ltx/vae.py", "length.square() / x.shape[1]", "length.square()", VAE),
    Mutant("ltx/vae.py", 'block_list(config["decoder_blocks"])[::-1]',
           'block_list(config["decoder_blocks"])', VAE),
    Mutant("ltx/vae.py", "return x[:, :-1]", "return x[:, 1:]", VAE),
    Mutant("ltx/vae.py", "latent * std + mean", "(latent + mean) * std", VAE),
    Mutant("ltx/vae.py", "F - (F - 1) % self.time_scale", "F - F % self.time_scale", VAE),
    Mutant("ltx/vae.py", "cell - max(1, reach)", "cell - reach", VAE),
    Mutant("ltx/vae.py", "VAE_PREFIX, dtype, device)", "VAE_PREFIX, None, device)", VAE),
    Mutant("ltx/vae.py", "-10 * torch.log10", "-20 * torch.log10", VAE),
    Mutant("ltx/tiling.py", "range(0, length - overlap,", "range(0, length,", TILING),
    Mutant("ltx/tiling.py", "Tile(a - 1, b, left + 1, right) if a", "Tile(a - 1, b, left, right) if a",
           TILING),
    Mutant("ltx/tiling.py", "(k + 1) / (tile.left + 1)", "k / (tile.left + 1)", TILING),
    Mutant("ltx/tiling.py", "math.ceil(overlap / scale)", "round(overlap / scale)", TILING),
    Mutant("ltx/tiling.py", "size * side / max(H, W)", "size * side / min(H, W)", TILING),
    Mutant("ltx/tiling.py", "frames[:, :, done:].clone()", "frames[:, :, done:]", TILING),
    Mutant("ltx/tiling.py", "frames[:, :, : held.shape[2]] += held", "pass", TILING),
    Mutant("ltx/tiling.py", "if asked and size <= shared:", "if asked and size < shared:", TILING),
    Mutant("ltx/tiling.py", "@torch.no_grad()", "@torch.enable_grad()", TILING),
    Mutant("ltx/offload.py", 'block.to("meta")', "pass", OFFLOAD),
    Mutant("ltx/offload.py", "yield self.slots[i % 2]", "yield self.slots[0]", OFFLOAD),
    Mutant("ltx/offload.py", "compute.wait_stream(self.side)\n                if", "if", OFFLOAD),
    Mutant("ltx/offload.py", "self.side.wait_stream(compute)", "pass", OFFLOAD),
    Mutant("ltx/offload.py", "compute.wait_stream(self.side)\n\n", "pass\n\n", OFFLOAD),
    Mutant("ltx/offload.py", "weight.clamp(-bound, bound).to(FLOAT8)", "weight.to(FLOAT8)", OFFLOAD),
    Mutant("ltx/offload.py", "changed(stem + name, tensor)", "changed(name, tensor)", OFFLOAD),
    Mutant("ltx/offload.py", "check_weights(model, path, prefix)  # now", "pass  # now", OFFLOAD),
    Mutant("ltx/offload.py", "self.blocks, self.slots = blocks, []",
           "self.blocks, self.slots = nn.ModuleList(blocks), []", OFFLOAD),
    Mutant("ltx/plan.py", '"K * 4*n*n*D"', '"K * 4*n*N*D"', PLAN),
    Mutant("ltx/plan.py", "2 * weights[name] // sizes[count]", "weights[name] // sizes[count]", PLAN),
    Mutant("ltx/plan.py", "made.keys() - given.keys()", "made.keys()", PLAN),
    Mutant("ltx/plan.py", "count(False), L + R: reads_reference.count(True)",
           "count(True), L + R: reads_reference.count(False)", PLAN),
    Mutant("ltx/plan.py", "frame if tiled else frame *", "frame if not tiled else frame *", PLAN),
    Mutant("ltx/plan.py", '"yes" if untiled <= card', '"yes" if tiled <= card', PLAN),
    Mutant("ltx/plan.py", "- 1).bit_length()", ").bit_length()", PLAN),
    Mutant("ltx/fast_cpu.py", "torch.is_grad_enabled() or", "False or", FAST_CPU),
    Mutant("ltx/fast_cpu.py", 'torch.is_autocast_enabled("cpu")', "False", FAST_CPU),
    Mutant("ltx/fast_cpu.py", "scores.softmax(-1)", "scores.softmax(-2)", FAST_CPU),
    Mutant("ltx/fast_cpu.py", "or attn_mask is not None or", "or", FAST_CPU),
    Mutant("ltx/fast_cpu.py", "bias, padding, stride, dilation", "bias, stride, padding, dilation",
           FAST_CPU),
    Mutant("ltx/fast_cpu.py", "torch.float32 or not torch.backends.mkldnn.enabled:", "torch.float32:",
           FAST_CPU),
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
