"""Evidence for each part of the paper: leave one out, train again, measure, with error bars.

The failure this prevents: believing in a part because the whole works. All variants, on the tiny
world, start from one base, see the same clips, noise levels and noise (train.py draws them from
seed, step and place), and are scored on the same people, prompts and noise. Half of the references
show the clip's own setting (toy/world.py), so copying is tempting.

paper: placement, augmentation, face-guided losses, three streams are its parts (ST-DRC, arXiv
2606.02441). our reading: what exactly each part is, reference dropout, recipe, variants, scales.

Conventions. Every result is one JSON file, FOLDER/<variant>/seed-<s>.json, next to the folder of
its training. A stopped `run` goes on: finished results stay, begun trainings have their states.
Scores are those of study/scores.py; `prompt` is the mean of action, scene, light and shirt.
Guidance scale 1 = off, 0 = condition removed.

    python -m study.ablate run --jobs 2                    36 trainings and 64 scorings
    python -m study.ablate run --only placement --seeds 0 --steps 200           a part of it
    python -m study.ablate table                           FOLDER/table.md and FOLDER/grid.png

Read next: study/estimates.py
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from clips.face import load_facenet
from common.cli import Parser, check_ranges, command
from common.files import atomic_write, read_json, write_json
from guidance import Guidance, stream_weights
from study import scores
from study.evaluate import Models, chance_levels, generate, score_row, test_set
from study.results import FACTORS, compute, grid, keep_settings, number, report
from toy.head import load_head
from training import plot

HERE = Path(__file__).resolve().parents[1]  # the repository
TINY = HERE / "weights" / "tiny"
SCALES = (3.0, 2.0, "text_first")  # text, reference, order: the base's own, for every training
DEFAULT = {"placement": "tass", "augment_color": 0.3, "augment_pose": 0.5, "augment_layout": 0.5,
           "w_face": 1.0, "w_id": 0.1, "drop_ref": 0.1, "drop_both": 0.05, "drop_text": 0.05}
PLAIN = {"augment_color": 0.0, "augment_pose": 0.0, "augment_layout": 0.0}
TRAINED = {  # part -> variant -> what differs from DEFAULT
    "default": {"default": {}},
    "placement": {name: {"placement": name} for name in ("overlap", "time_only", "space_only")},
    # Does either part stop copying without the other?
    "both": {"overlap_no_augment": {"placement": "overlap"} | PLAIN},
    "augment": {"no_augment": PLAIN, "color_only": PLAIN | {"augment_color": 0.3},
                "pose_only": PLAIN | {"augment_pose": 0.5},
                "layout_only": PLAIN | {"augment_layout": 0.5}},
    "face_loss": {"no_face_loss": {"w_face": 0.0}},
    "identity_loss": {"no_identity_loss": {"w_id": 0.0}},
    "dropout": {"no_reference_dropout": {"drop_ref": 0.0, "drop_both": 0.0, "drop_text": 0.1}},
}
# The default's weights at other scales. One joint scale s of both conditions, v_0 + s (v_RT - v_0),
# is text_first with equal scales: the text-only stream cancels out, and two streams are left.
GUIDED = {"no reference": (3.0, 0.0, "text_first"),
          "one joint scale of 2": (2.0, 2.0, "text_first"),
          "one joint scale of 3": (3.0, 3.0, "text_first"),
          "reference first": (3.0, 2.0, "reference_first")}
GRID = [(text, ref, "text_first") for text in (1.0, 2.0, 3.0, 5.0)  # with the first seed only
        for ref in (0.0, 1.0, 2.0, 3.0, 4.0)]
PARTS = (*list(TRAINED)[1:], "guidance")
NETWORKS = ("face", "eval_encoder", "head")
SHARED = ("steps", "batch", "people", "num_inference_steps")  # by all results of a folder


# ------------------------------------------------------------ what there is to do


@dataclass(frozen=True)
class Task:
    """One result: a variant and a seed. Those of the part "guidance" use the default's weights."""

    variant: str
    seed: int
    part: str
    scales: tuple[float, float, str] = SCALES

    def result(self, folder: Path) -> Path:
        return folder / self.variant / f"seed-{self.seed}.json"

    def weights(self, folder: Path) -> Path:
        variant = "default" if self.part == "guidance" else self.variant
        return folder / variant / f"seed-{self.seed}" / "model.safetensors"


def guided(scales: tuple[float, float, str]) -> str:
    """Name of the default's weights at these scales; at the usual ones it is the default itself."""
    text, ref, order = scales
    return "default" if scales == SCALES else f"text-{text:g}-ref-{ref:g}-{order}"


def plan(only: list[str], seeds: list[int]) -> list[Task]:
    """Every result of the parts `only` and the default, each once: trainings, then guidance."""
    tasks = [Task(variant, seed, part) for seed in seeds for part, variants in TRAINED.items()
             if part in ("default", *only) for variant in variants]
    for seed in seeds if "guidance" in only else []:
        asked = dict.fromkeys([*GUIDED.values(), *(GRID if seed == seeds[0] else [])])
        tasks += [Task(guided(scales), seed, "guidance", scales)
                  for scales in asked if scales != SCALES]
    return tasks


def words(**flags: object) -> list[str]:
    """Flags of a command line, --like-this; None is left out."""
    return [word for name, value in flags.items() if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))]


def train_flags(task: Task, args: argparse.Namespace) -> list[str]:
    changed = next(variants[task.variant] for variants in TRAINED.values()
                   if task.variant in variants)
    return ["--full", "--no-gradient-checkpointing", *(["--compile"] if args.compile else []),
            *words(optimizer="muon", batch=args.batch, steps=args.steps, seed=task.seed,
                   validate_every=args.steps, gemma_root=args.gemma_root,
                   checkpoint_path=args.checkpoint_path, face=args.face,
                   out=task.weights(args.folder).parent, **DEFAULT | changed)]


def commands(task: Task, args: argparse.Namespace) -> list[list[str]]:
    """What a task still needs, in order. train.py writes its weights at the very end, at once."""
    same = ("folder", *SHARED, "checkpoint_path", "gemma_root", *NETWORKS)
    score = [sys.executable, "-m", "study.ablate", "score",
             *words(variant=task.variant, seed=task.seed, **{k: getattr(args, k) for k in same})]
    if task.part == "guidance" or task.weights(args.folder).exists():
        return [score]
    return [[sys.executable, str(HERE / "train.py"), *train_flags(task, args)], score]


def settings(args: argparse.Namespace) -> dict:
    """What all results of a folder share, files by content. Refuses a folder begun otherwise."""
    shared, files = {name: getattr(args, name) for name in SHARED}, ("checkpoint_path", *NETWORKS)
    for option in files:
        path = getattr(args, option)
        if not path.is_file():
            raise ValueError(f"expected a file for --{option.replace('_', '-')}, got {path}; "
                             "toy.pretrain makes it")
        shared[option] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return keep_settings(args.folder / "settings.json", shared | {"recipe": DEFAULT}, files)


# ------------------------------------------------------------ running


def run_tasks(args: argparse.Namespace) -> bool:
    """Do what has no result yet, with a line for each; whether anything failed."""
    settings(args)
    tasks, deadline = plan(args.only, args.seeds), time.time() + 60 * args.minutes
    todo = [task for task in tasks if not task.result(args.folder).exists()]
    running: dict[subprocess.Popen, tuple[Task, list[list[str]]]] = {}
    failed = []
    print(f"{len(tasks) - len(todo)} of {len(tasks)} results are there; logs in {args.folder}")
    bar = tqdm(total=len(tasks), initial=len(tasks) - len(todo), desc="ablate", unit="result")
    try:
        while (todo or running) and time.time() < deadline:
            # Guidance waits for the weights of the default, which may be in the making.
            training = any(task.part != "guidance" for task, _ in running.values())
            if todo and len(running) < args.jobs and not (training and todo[0].part == "guidance"):
                task = todo.pop(0)
                begin(running, task, commands(task, args), args.folder)
            for child in [child for child in running if child.poll() is not None]:
                task, more = running.pop(child)
                if child.returncode == 0 and more:
                    begin(running, task, more, args.folder)
                    continue
                told = outcome(task, child.returncode, args.folder)
                failed += [f"{task.variant} seed {task.seed}"] if told != "finished" else []
                bar.write(f"{task.variant} seed {task.seed} {told}")
                bar.update()
            time.sleep(0.05)
    finally:
        bar.close()
        for child in running:
            child.terminate()  # trainings save and end
        for child in running:
            child.wait()
    if left := len(todo) + len(running):
        print(f"time is up, {left} results to go; the same command goes on")
    if failed:
        print(f"failed: {', '.join(failed)}; their .log files say why, the same command tries "
              "again", file=sys.stderr)
    return bool(failed)


def begin(running: dict, task: Task, lines: list[list[str]], folder: Path) -> None:
    """Start the first of a task's commands, its output added to the log; the others come later.

    It gets a process group of its own: Ctrl-C is for us, who pass it on as SIGTERM.
    """
    log = task.result(folder).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(HERE)}
    with open(log, "ab") as file:
        child = subprocess.Popen(lines[0], stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                                 start_new_session=True, env=env)
    running[child] = task, lines[1:]


def outcome(task: Task, status: int, folder: Path) -> str:
    """"finished", or what went wrong: the last line of the log says it."""
    if task.result(folder).exists():
        return "finished"
    log = task.result(folder).with_suffix(".log").read_text(errors="replace")
    return f"failed with status {status}: {(log.splitlines() or [''])[-1].strip()}"


# ------------------------------------------------------------ scoring


def score_run(task: Task, args: argparse.Namespace) -> dict[str, dict]:
    """The record's "scores", "chance" and "clips", with a task's weights and scales.

    One clip for each of the first `args.people` validation people; prompts and noise are the same
    for every task.
    """
    m = Models(task.weights(args.folder), args.gemma_root)
    size, frames = (m.config["inference"][name] for name in ("height", "num_frames"))
    data = test_set(args.people, 1, size, frames, "val")
    text_scale, ref_scale, order = task.scales
    how = argparse.Namespace(num_inference_steps=args.num_inference_steps, text_scale=text_scale,
                             ref_scale=ref_scale, order=order, rescale=0.0, guide_range=(0.0, 1.0),
                             guide_every=1, dtype="float32", seed=0)
    video = generate(m, data["captions"], data["references"][data["who"]], how, task.variant)
    nets = load_facenet(args.eval_encoder), load_head(args.head)
    real = scores.embed_clips(nets[0], data["true"]).flatten(0, 1)      # (5 n, E)
    row = score_row(video, data, nets, real)
    clips, means = row["per_clip"], {name: mean for name, (mean, _) in row["scores"].items()}
    four = zip(*(clips[name] for name in FACTORS), strict=True)
    clips["prompt"] = [sum(values) / len(FACTORS) for values in four]
    means["prompt"] = sum(clips["prompt"]) / len(clips["prompt"])
    chance = chance_levels(args.people) | row["leaks_by_chance"]
    return {"scores": {name: number(value) for name, value in means.items()},
            "chance": {name: number(value) for name, value in chance.items()}, "clips": clips}


def score(args: argparse.Namespace) -> bool:
    """Score finished weights and write the result; the training's states have served, and go."""
    tasks, started = {task.variant: task for task in plan(list(PARTS), [args.seed])}, time.time()
    if args.variant not in tasks:
        raise ValueError(f"expected --variant out of {', '.join(tasks)}, got {args.variant}; "
                         "choose one of these")
    task, shared = tasks[args.variant], settings(args)
    folder, training, flags = task.weights(args.folder).parent, 0.0, None
    found = score_run(task, args)
    if task.part != "guidance":
        training = max(line["seconds"] for line in plot.read_log(folder / "log.jsonl"))
        flags = [word.removeprefix(f"{HERE}{os.sep}") for word in train_flags(task, args)]
    write_json(task.result(args.folder), {
        "arguments": {"variant": task.variant, "seed": task.seed, "part": task.part,
                      "scales": task.scales, **shared, "train.py": flags},
        "seconds": {"training": round(training, 1), "scoring": round(time.time() - started, 1)},
        **found})
    for state in folder.glob("state-*.safetensors") if flags else ():
        state.unlink()
    return False


# ------------------------------------------------------------ tables


def table(args: argparse.Namespace) -> bool:
    """Print and write FOLDER/table.md, and FOLDER/grid.png, from the results that are there."""
    tasks = plan(args.only, args.seeds)
    records = {t: read_json(t.result(args.folder)) for t in tasks
               if t.result(args.folder).exists()}
    if not records:
        raise ValueError(f"expected results in {args.folder}, got none; "
                         "`python -m study.ablate run` makes them")

    def of(variant: str) -> dict[int, dict]:
        return {t.seed: record for t, record in records.items() if t.variant == variant}
    rows = {part: {name: of(name) for name in TRAINED.get(part, [])} for part in args.only}
    lost = [f"{t.variant} seed {t.seed}" for t in tasks if t not in records]
    lines = [f"Missing: {', '.join(lost) or 'nothing'}.", ""]
    if "guidance" in args.only:
        streams = {label: len(stream_weights(Guidance(*GUIDED[label]))) for label in GUIDED}
        rows["guidance"] = {f"{label} ({streams[label]} streams)": of(guided(scales))
                            for label, scales in GUIDED.items()}
        first = {t.scales[:2]: record for t, record in records.items() if t.seed == args.seeds[0]
                 and t.scales in GRID and t.variant == guided(t.scales)}
        lines += [f"## similarity / prompt, seed {args.seeds[0]}", "",
                  *grid(first, args.folder / "grid.png"), ""]
    spent = {part: [record for t, record in records.items() if t.part == part]
             for part in ("default", *args.only)}
    lines = [*report(rows, of("default")), *lines,
             "## hours (training: in steps, one thread)", "", *compute(spent)]
    atomic_write(args.folder / "table.md", lambda p: p.write_text("\n".join(lines) + "\n", "utf-8"))
    print("\n".join(lines))
    return False


# ------------------------------------------------------------ the command


def parse_arguments(line: list[str] | None = None) -> argparse.Namespace:
    p = Parser("study.ablate", description=__doc__.split("\n")[0],
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("what", choices=["run", "score", "table"],
        help="train and score; score one training; make tables")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=800)
    add("--batch", type=int, default=8)
    add("--people", type=int, default=128, help="validation people to score, one prompt each")
    add("--num-inference-steps", type=int, help="default: the checkpoint's")
    add("--folder", type=Path, default=Path("runs/ablate"))
    add("--jobs", type=int, default=2, help="trainings or scorings at a time")
    add("--minutes", type=float, default=1e9, help="stop after this time; run again to go on")
    add("--compile", action="store_true", help="handed on to train.py")
    add("--checkpoint-path", type=Path, default=Path("runs/base.safetensors"),
        help="the base of all trainings")
    add("--gemma-root", type=Path, default=Path("runs/gemma"))
    add("--face", type=Path, default=Path("runs/face.safetensors"),
        help="recogniser of the identity loss")
    add("--eval-encoder", type=Path, default=TINY / "eval_encoder.safetensors",
        help="recogniser that scores")
    add("--head", type=Path, default=TINY / "head_pose.safetensors",
        help="reads the head's position and angle")
    add("--variant", default="default", help="score: which")
    add("--seed", type=int, default=0, help="score: which")
    return p.parse_args(line)


def main(line: list[str] | None = None) -> int:
    """Exit status: 0, 1 if a run failed, 2 for what a user can mend, 130 and 143 after signals."""
    args, failed = parse_arguments(line), []

    def do() -> None:
        least = {"steps": 1, "batch": 1, "jobs": 1, "people": 3, "minutes": 0,
                 "num_inference_steps": 1, "seed": 0, "seeds": 0}
        check_ranges(args, {name: (low, math.inf) for name, low in least.items()})
        if len(set(args.seeds)) < len(args.seeds):
            raise ValueError(f"expected different --seeds, got {args.seeds}; "
                             "each is a run of its own")
        failed.append({"run": run_tasks, "score": score, "table": table}[args.what](args))
    return command("study.ablate", do) or int(any(failed))


if __name__ == "__main__":
    sys.exit(main())
