"""Evidence for each part of the paper: leave one out, train again, measure, with error bars. On the tiny world.

The failure this prevents: believing a part because the whole works. All variants start from one base, see the same
clips, noise levels and noise (train.py draws them from seed, step and place), and are scored on the same people,
prompts and noise. Half of the references show the clip's own setting (world.py), so copying is tempting.

paper: placement, augmentation, face-guided losses, three streams are its parts (ST-DRC, arXiv 2606.02441).
our reading: what exactly each part is, reference dropout, the default recipe, the variants, the scales.

Conventions. Every result is one JSON file, FOLDER/<variant>/seed-<s>.json, beside the folder of its training. A stopped
`run` goes on: finished results stay, begun trainings have their states. Scores are those of scores.py; `prompt` is the
mean of action, scene, light and shirt. Guidance scale 1 = off, 0 = condition removed.

    python -m study.ablate run --jobs 2                                    36 trainings, one thread each, and 64 scorings
    python -m study.ablate run --only placement --seeds 0 --steps 200      a part of it
    python -m study.ablate table                                           FOLDER/table.md and FOLDER/grid.png

Read next: results.py
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clips.face import load_facenet
from common.cli import command
from common.files import atomic_write, read_json, write_json
from guidance import stream_weights
from study import scores
from study.evaluate import Models, generate, test_set
from study.results import FACTORS, compute, grid, keep_settings, number, report
from toy import world
from training import plot

HERE = Path(__file__).resolve().parents[1]  # the repository
TINY = HERE / "weights" / "tiny"
SCALES = (3.0, 2.0, "text_first")  # text, reference, order: the base's own, for every training
DEFAULT = {"placement": "tass", "augment_color": 0.3, "augment_pose": 0.5, "augment_layout": 0.5, "w_face": 1.0,
           "w_id": 0.1, "drop_ref": 0.1, "drop_both": 0.05, "drop_text": 0.05}
PLAIN = {"augment_color": 0.0, "augment_pose": 0.0, "augment_layout": 0.0}
TRAINED = {  # part -> variant -> what differs from DEFAULT
    "default": {"default": {}},
    "placement": {name: {"placement": name} for name in ("overlap", "time_only", "space_only")},
    "both": {"overlap_no_augment": {"placement": "overlap"} | PLAIN},  # does either part stop copying without the other?
    "augment": {"no_augment": PLAIN, "color_only": PLAIN | {"augment_color": 0.3},
                "pose_only": PLAIN | {"augment_pose": 0.5}, "layout_only": PLAIN | {"augment_layout": 0.5}},
    "face_loss": {"no_face_loss": {"w_face": 0.0}},
    "identity_loss": {"no_identity_loss": {"w_id": 0.0}},
    "dropout": {"no_reference_dropout": {"drop_ref": 0.0, "drop_both": 0.0, "drop_text": 0.1}},
}
# The default's weights at other scales. One joint scale s for both conditions, v_0 + s (v_RT - v_0), is text_first with
# equal scales: the text-only stream cancels out, and two streams are left.
GUIDED = {"no reference": (3.0, 0.0, "text_first"), "one joint scale of 2": (2.0, 2.0, "text_first"),
          "one joint scale of 3": (3.0, 3.0, "text_first"), "reference first": (3.0, 2.0, "reference_first")}
GRID = [(text, ref, "text_first") for text in (1.0, 2.0, 3.0, 5.0) for ref in (0.0, 1.0, 2.0, 3.0, 4.0)]  # first seed
PARTS = (*list(TRAINED)[1:], "guidance")
NETWORKS = ("face", "eval_encoder", "head")


# -------------------------------------------------------------------------------------------------- what there is to do
@dataclass(frozen=True)
class Task:
    """One result: a variant and a seed. Those of the part "guidance" use the weights of the default with that seed."""

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
    """Variant of the default's weights at these scales; at the usual ones it is the default itself."""
    return "default" if scales == SCALES else f"text-{scales[0]:g}-ref-{scales[1]:g}-{scales[2]}"


def plan(only: list[str], seeds: list[int]) -> list[Task]:
    """Every result of the parts `only`, each once: trainings, seed by seed, then guidance. Always with the default."""
    tasks = [Task(variant, seed, part) for seed in seeds for part, variants in TRAINED.items()
             if part in ("default", *only) for variant in variants]
    for seed in seeds if "guidance" in only else []:
        asked = dict.fromkeys([*GUIDED.values(), *(GRID if seed == seeds[0] else [])])
        tasks += [Task(guided(scales), seed, "guidance", scales) for scales in asked if scales != SCALES]
    return tasks


def words(**flags: object) -> list[str]:
    """Flags of a command line, --like-this; None is left out."""
    return [word for name, value in flags.items() if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))]


def train_flags(task: Task, args: argparse.Namespace) -> list[str]:
    recipe = next(DEFAULT | variants[task.variant] for variants in TRAINED.values() if task.variant in variants)
    return ["--full", "--no-gradient-checkpointing", *(["--compile"] if args.compile else []),
            *words(optimizer="muon", decay=0.5, final_lr=0, batch=args.batch, steps=args.steps, seed=task.seed,
                   validate_every=args.steps, checkpoint_path=args.checkpoint_path, gemma_root=args.gemma_root,
                   face=args.face, out=task.weights(args.folder).parent, **recipe)]


def commands(task: Task, args: argparse.Namespace) -> list[list[str]]:
    """What a task still needs, one command after another. train.py writes its weights at the very end, and at once."""
    same = ("folder", "steps", "batch", "people", "num_inference_steps", "checkpoint_path", "gemma_root", *NETWORKS)
    score = [sys.executable, "-m", "study.ablate", "score", *words(variant=task.variant, seed=task.seed),
             *words(**{name: getattr(args, name) for name in same})]
    if task.part == "guidance" or task.weights(args.folder).exists():
        return [score]
    return [[sys.executable, str(HERE / "train.py"), *train_flags(task, args)], score]


def settings(args: argparse.Namespace) -> dict:
    """What all results of a folder share, files by content. Raises ValueError if the folder was begun otherwise."""
    shared = {name: getattr(args, name) for name in ("steps", "batch", "people", "num_inference_steps")}
    for option in ("checkpoint_path", *NETWORKS):
        path = getattr(args, option)
        if not path.is_file():
            raise ValueError(f"expected a file for --{option.replace('_', '-')}, got {path}; pretrain.py makes it")
        shared[option] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return keep_settings(args.folder / "settings.json", shared | {"recipe": DEFAULT})


# -------------------------------------------------------------------------------------------------------------- running
class Children:
    """The processes that are running, so that all can be stopped. Used by several threads."""

    def __init__(self) -> None:
        self.lock, self.alive, self.stopped = threading.Lock(), set(), False

    def run(self, line: list[str], log: Path) -> int:
        """One command, its output added to `log`; its exit status. In a process group of its own: Ctrl-C is for us."""
        with open(log, "ab") as file:
            with self.lock:  # no child is begun behind `stop`'s back
                if self.stopped:
                    return -1
                child = subprocess.Popen(line, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                                         start_new_session=True, env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(HERE)})
                self.alive.add(child)
            status = child.wait()
        with self.lock:
            self.alive.discard(child)
        return status

    def stop(self) -> None:
        """SIGTERM to all: trainings save and end. The threads in `run` wait for that."""
        with self.lock:
            self.stopped = True
            for child in self.alive:
                child.terminate()


def work(task: Task, args: argparse.Namespace, children: Children) -> str:
    """Train and score; what went wrong, or nothing."""
    log = task.result(args.folder).with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    for line in commands(task, args):
        if status := children.run(line, log):
            last = (log.read_text(errors="replace").splitlines() or [""])[-1]
            return f"failed with status {status}: {last.strip()}"
    return "" if task.result(args.folder).exists() else "failed: it ended without a result"


def hours_left(args: argparse.Namespace, tasks: list[Task], waiting: set[Task]) -> str:
    """From what finished results took: scorings alone (True), trainings with their scorings (False)."""
    took: dict[bool, list[float]] = {True: [], False: []}
    for task in tasks:
        if task.result(args.folder).exists():
            spent = read_json(task.result(args.folder))["seconds"]
            took[True].append(spent["scoring"])
            took[False] += [spent["training"] + spent["scoring"]] if task.part != "guidance" else []
    each = {alone: sum(spent) / len(spent) if spent else math.nan for alone, spent in took.items()}
    left = sum(each[task.part == "guidance"] for task in waiting) / args.jobs / 3600
    return "unknown time" if math.isnan(left) else f"about {left:.1f} h"


def run_tasks(args: argparse.Namespace) -> bool:
    """Do what has no result yet, with a line for each; whether anything failed."""
    settings(args)
    tasks, deadline = plan(args.only, args.seeds), time.time() + 60 * args.minutes
    waiting, failed, children = {task for task in tasks if not task.result(args.folder).exists()}, [], Children()
    print(f"{len(tasks) - len(waiting)} of {len(tasks)} results are there; logs are in {args.folder}", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for wave in (False, True):  # guidance waits for the weights of the default
                jobs = {pool.submit(work, task, args, children): task for task in tasks
                        if task in waiting and (task.part == "guidance") == wave}
                for job in as_completed(jobs, min(max(0.0, deadline - time.time()), 1e7)):
                    task, wrong = jobs[job], job.result()
                    waiting.remove(task)
                    failed += [f"{task.variant} seed {task.seed}"] if wrong else []
                    print(f"{len(tasks) - len(waiting)} of {len(tasks)}: {task.variant} seed {task.seed} "
                          f"{wrong or 'finished'}; {hours_left(args, tasks, waiting)} left", flush=True)
        except TimeoutError:
            print(f"time is up, {len(waiting)} results to go; the same command goes on")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
    if failed:
        print(f"failed: {', '.join(failed)}; their .log files say why, the same command tries again", file=sys.stderr)
    return bool(failed)


# -------------------------------------------------------------------------------------------------------------- scoring
def score_run(task: Task, args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, float], dict[str, float]]:
    """Every score of every clip, scores of the whole set, and chance levels, with a task's weights and scales: one clip
    for each of the first `args.people` validation people; prompts and noise are the same for every task."""
    m = Models(task.weights(args.folder), args.gemma_root)
    data = test_set(args.people, 1, m.config["inference"]["height"], m.config["inference"]["num_frames"], "val")
    text_scale, ref_scale, order = task.scales
    how = argparse.Namespace(num_inference_steps=args.num_inference_steps, text_scale=text_scale, ref_scale=ref_scale,
                             order=order, rescale=0.0, guide_range=(0.0, 1.0), guide_every=1, dtype="float32", seed=0)
    video = generate(m, data["captions"], data["references"][data["who"]], how, task.variant)
    eval_encoder, head = load_facenet(args.eval_encoder), scores.load_head(args.head)
    clips = scores.per_clip(video, data, eval_encoder, head)
    clips["prompt"] = torch.stack([clips[name] for name in FACTORS]).mean(0)
    leaks = scores.leaks(video, data, head)
    vectors, true = (scores.embed_clips(eval_encoder, v).flatten(0, 1) for v in (video, data["true"]))   # (5 n, E) each
    whole = {name: value for name, (value, _) in leaks.items()} | {"frechet": scores.frechet(vectors, true)}
    choices = (world.ACTIONS, world.SCENES, world.LIGHTS, world.SHIRTS)
    chance = {name: 1 / len(table) for name, table in zip(FACTORS, choices, strict=True)}
    chance |= {"top1": 1 / args.people, "look_alike": 0.5} | {name: level for name, (_, level) in leaks.items()}
    return clips, whole, chance


def score(args: argparse.Namespace) -> bool:
    """Score finished weights and write the result; the states of the training are deleted, they have served."""
    tasks, started = {task.variant: task for task in plan(list(PARTS), [args.seed])}, time.time()
    if args.variant not in tasks:
        raise ValueError(f"expected --variant out of {', '.join(tasks)}, got {args.variant}; choose one of these")
    task, shared = tasks[args.variant], settings(args)
    folder, training = task.weights(args.folder).parent, task.part != "guidance"
    clips, whole, chance = score_run(task, args)
    means = {name: scores.summarise(values)[0] for name, values in clips.items()} | whole
    spent = max(line["seconds"] for line in plot.read_log(folder / "log.jsonl")) if training else 0.0
    write_json(task.result(args.folder), {
        "arguments": {"variant": task.variant, "seed": task.seed, "part": task.part, "scales": task.scales, **shared,
                      "train.py": [w.removeprefix(f"{HERE}/") for w in train_flags(task, args)] if training else None},
        "seconds": {"training": round(spent, 1), "scoring": round(time.time() - started, 1)},
        "scores": {name: number(value) for name, value in means.items()},
        "chance": {name: number(value) for name, value in chance.items()},
        "clips": {name: [number(value) for value in values.tolist()] for name, values in clips.items()}})
    for state in folder.glob("state-*.safetensors") if training else ():
        state.unlink()
    return False


# --------------------------------------------------------------------------------------------------------------- tables
def table(args: argparse.Namespace) -> bool:
    """Print and write FOLDER/table.md, and FOLDER/grid.png, from the results that are there; says what is missing."""
    tasks = plan(args.only, args.seeds)
    records = {t: read_json(t.result(args.folder)) for t in tasks if t.result(args.folder).exists()}
    if not records:
        raise ValueError(f"expected results in {args.folder}, got none; `python -m study.ablate run` makes them")

    def of(variant: str) -> dict[int, dict]:
        return {t.seed: record for t, record in records.items() if t.variant == variant}
    rows = {part: {variant: of(variant) for variant in TRAINED.get(part, [])} for part in args.only}
    lines = [f"Missing: {', '.join(f'{t.variant} seed {t.seed}' for t in tasks if t not in records) or 'nothing'}.", ""]
    if "guidance" in args.only:
        rows["guidance"] = {f"{label} ({len(stream_weights(*scales))} streams)": of(guided(scales))
                            for label, scales in GUIDED.items()}
        first = {t.scales[:2]: record for t, record in records.items() if t.seed == args.seeds[0] and t.scales in GRID
                 and t.variant == guided(t.scales)}
        lines += [f"## similarity / prompt, seed {args.seeds[0]}", "", *grid(first, args.folder / "grid.png"), ""]
    spent = {part: [record for t, record in records.items() if t.part == part] for part in ("default", *args.only)}
    lines = [*report(rows, of("default")), *lines, "## hours (training: in steps, one thread)", "", *compute(spent)]
    atomic_write(args.folder / "table.md", lambda beside: beside.write_text("\n".join(lines) + "\n"))
    print("\n".join(lines))
    return False


def parse_arguments(line: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(prog="study.ablate", description=__doc__.split("\n")[0],
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("what", choices=["run", "score", "table"], help="train and score; score one training; make tables")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="these parts")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--steps", type=int, default=800)
    add("--batch", type=int, default=8)
    add("--people", type=int, default=128, help="validation people to score, one prompt each")
    add("--num-inference-steps", type=int, help="default: the checkpoint's")
    add("--folder", type=Path, default=Path("runs") / "ablate")
    add("--jobs", type=int, default=2, help="trainings or scorings at a time")
    add("--minutes", type=float, default=1e9, help="stop after this time; run again to go on")
    add("--compile", action="store_true", help="handed on to train.py")
    add("--checkpoint-path", type=Path, default=Path("runs/base.safetensors"), help="the base of all trainings")
    add("--gemma-root", type=Path, default=Path("runs/gemma"))
    add("--face", type=Path, default=Path("runs/face.safetensors"), help="recogniser of the identity loss")
    add("--eval_encoder", type=Path, default=TINY / "eval_encoder.safetensors", help="recogniser that scores")
    add("--head", type=Path, default=TINY / "head_pose.safetensors", help="reads the head's position and angle")
    add("--variant", default="default", help="score: which")
    add("--seed", type=int, default=0, help="score: which")
    return p.parse_args(line)


def main(line: list[str] | None = None) -> int:
    """Exit status: 0, 1 if a run failed, 2 for what a user can mend, 130 and 143 after Ctrl-C and SIGTERM."""
    args, failed = parse_arguments(line), []

    def do() -> None:
        low = {"steps": 1, "batch": 1, "jobs": 1, "people": 3, "minutes": 0, "num_inference_steps": 1, "seed": 0}
        for name, least in low.items():
            if (value := getattr(args, name)) is not None and not value >= least:
                raise ValueError(f"expected --{name.replace('_', '-')} of {least} or more, got {value}; see --help")
        if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
            raise ValueError(f"expected different --seeds from 0 on, got {args.seeds}; each is a run of its own")
        failed.append({"run": run_tasks, "score": score, "table": table}[args.what](args))
    return command("study.ablate", do) or int(any(failed))


if __name__ == "__main__":
    sys.exit(main())
