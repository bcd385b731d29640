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
    # ltx: the text half and LoRA; toy/vocabulary.py
    Mutant("ltx/tokenizer.py", "sorted(added, key=len, reverse=True)",
           "sorted(added, key=len)", "tests/test_tokenizer.py"),
    Mutant("ltx/tokenizer.py", "heapq.heappush(heap, (rank, i,",
           "heapq.heappush(heap, (-rank, i,", "tests/test_tokenizer.py"),
    Mutant("ltx/tokenizer.py", "offer(before[i], i)", "offer(i, i)", "tests/test_tokenizer.py"),
    Mutant("ltx/tokenizer.py", "*self.raw_ids(text.strip())]",
           "*self.raw_ids(text)]", "tests/test_tokenizer.py"),
    Mutant("ltx/tokenizer.py", "self.encode(text)[:length]",
           "self.encode(text)[-length:]", "tests/test_tokenizer.py"),
    Mutant("ltx/tokenizer.py", "[self.pad] * padding + ids",
           "ids + [self.pad] * padding", "tests/test_tokenizer.py"),
    Mutant("ltx/tokenizer.py", ' or not model.get("byte_fallback")', "", "tests/test_tokenizer.py"),
    Mutant("ltx/tokenizer.py", "if pair[0] + pair[1] not in vocab:",
           "if False:", "tests/test_tokenizer.py"),
    Mutant("toy/vocabulary.py", "(-pairs[p], p)", "(-pairs[p],)", "tests/test_tokenizer.py"),
    Mutant("toy/vocabulary.py", "pairs[pair] += words[word]",
           "pairs[pair] += 1", "tests/test_tokenizer.py"),
    Mutant("toy/vocabulary.py", "pairs[pair] < 2", "pairs[pair] < 1", "tests/test_tokenizer.py"),
    Mutant("toy/vocabulary.py", "parts[i : i + 2] =",
           "parts[i : i + 1] =", "tests/test_tokenizer.py"),
    Mutant("ltx/gemma.py", "(1 + self.weight.float())",
           "self.weight.float()", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "(key > query - window)",
           "(key >= query - window)", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "(mask[:, None, :] > 0)",
           "(mask[:, :, None] > 0)", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "k.repeat_interleave(self.groups, dim=1)",
           "k.repeat(1, self.groups, 1, 1)", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "config.query_pre_attn_scalar**-0.5",
           "config.head_dim**-0.5", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "SLIDING: _angles(N, config.head_dim, config.local_theta,",
           "SLIDING: _angles(N, config.head_dim, config.global_theta,", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "(-pair / hd) / factor)",
           "(-pair / hd) * factor)", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "states[-1] = self.norm(x)", "states[-1] = x", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "torch.tensor(config.hidden_size**0.5, dtype=x.dtype,",
           "torch.tensor(config.hidden_size**0.5,", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "if (i + 1) % pattern else",
           "if i % pattern else", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "0 < value <= most", "0 <= value <= most", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "if (config.get(key) or value) != value:",
           "if False:", "tests/test_gemma.py"),
    Mutant("ltx/gemma.py", "if want != (got := tuple(row.get_shape())):",
           "if len(want) != len(got := tuple(row.get_shape())):", "tests/test_gemma.py"),
    Mutant("ltx/text.py", "(dim / gemma_hidden) ** 0.5",
           "(gemma_hidden / dim) ** 0.5", "tests/test_text.py"),
    Mutant("ltx/text.py", "torch.stack(states, dim=-1)",
           "torch.stack(states, dim=-2)", "tests/test_text.py"),
    Mutant("ltx/text.py", "torch.where(mask[..., None] > 0, flat, torch.zeros_like(flat))",
           "flat", "tests/test_text.py"),
    Mutant("ltx/text.py", "descending=True, stable=True",
           "descending=False, stable=True", "tests/test_text.py"),
    Mutant("ltx/text.py", "registers.repeat(N // count, 1)",
           "registers.repeat_interleave(N // count, 0)", "tests/test_text.py"),
    Mutant("ltx/text.py", "< real.sum(1, keepdim=True)",
           "<= real.sum(1, keepdim=True)", "tests/test_text.py"),
    Mutant("ltx/text.py", "    if length % registers:", "    if False:", "tests/test_text.py"),
    Mutant("ltx/text.py", "(last := max(tokenizer.pieces)) >= sizes",
           "(last := max(tokenizer.pieces)) > sizes", "tests/test_text.py"),
    Mutant("ltx/text.py", "if type(prompts) is str:", "if False:", "tests/test_text.py"),
    Mutant("ltx/text.py", "[len(tokenizer.encode(prompt)) for",
           "[length for", "tests/test_text.py"),
    Mutant("ltx/lora.py", "torch.zeros(linear.out_features, rank), alpha / rank)",
           "torch.ones(linear.out_features, rank), alpha / rank)", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "    model.requires_grad_(False)\n", "", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "= B * layer.scale", "= B", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "weight.to(torch.float32, copy=True)",
           "weight.to(torch.float32)", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "A.to(total), alpha=scale)", "A.to(total))", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "_fused(weight, [(A, B, strength * scale)])",
           "_fused(weight, [(A, B, strength)])", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "append((A, B, strength * scale))",
           "append((A, B, strength))", "tests/test_lora.py"),
    Mutant("ltx/lora.py", " or not math.isfinite(number):", ":", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "1.0 if alpha is None else alpha / rank",
           "1.0 if alpha is None else alpha", "tests/test_lora.py"),
    Mutant("ltx/lora.py", '{"prompt_adaln_single": "prompt_adaln", "adaln_single": "time_embed",',
           '{"adaln_single": "time_embed", "prompt_adaln_single": "prompt_adaln",',
           "tests/test_lora.py"),
    Mutant("ltx/lora.py", "    if unknown:", "    if False:", "tests/test_lora.py"),
    Mutant("ltx/lora.py", "                if part in parts:",
           "                if False:", "tests/test_lora.py"),
    Mutant("ltx/lora.py", '("audio", "a2v_ca", "v2a_ca")', '("audio",)', "tests/test_lora.py"),
    # study/figures: what the pictures say
    Mutant("study/figures.py", '" + s_R (v_R - v_0)"', '" + s_R (v_0 - v_R)"',
           "tests/test_figures.py::test_the_formula_under_an_order_is_its_sum"),
    Mutant("study/figures.py", '((1, "v_0", "v_R"), (0, "v_R", "v_RT"))',
           '((1, "v_0", "v_T"), (0, "v_T", "v_RT"))',
           "tests/test_figures.py::test_the_streams_beside_the_arrows_are_those_that_are_run"),
    Mutant("study/figures.py", "world.ACTIONS[action]", "world.ACTIONS[action - 1]",
           "tests/test_figures.py::test_the_two_words_under_a_person_are_the_prompts"),
    Mutant("study/figures.py", "text_scale=text, ref_scale=ref", "text_scale=ref, ref_scale=text",
           "tests/test_figures.py::test_the_grid_of_scales_asks_for_all_pairs_of_one_prompt"),
    Mutant("study/figures.py", "v_hat = loss.add_noise(x0, noise, s), noise - other",
           "v_hat = loss.add_noise(x0, noise, s), noise - x0",
           "tests/test_figures.py::test_a_wrong_face_costs_more_on_the_face_than_in_the_plain_loss"),
    Mutant("study/figures.py", 'models().config["inference"] | scales',
           'models().config["inference"]', "tests/test_figures.py"),
    Mutant("study/figures.py", "append_images=others, loop=0", "append_images=others, loop=1",
           "tests/test_figures.py::test_the_animation_has_the_clips_frames_and_repeats_for_ever"),
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
