"""What guidance costs when not every stream is run in every step, and what that does to scores.

Every option generates the same clips (256 people, one prompt each, same noise) as three streams in
every step do, so each score is compared clip by clip: the interval (95 %) is that of the
difference. `pose`, `position`, `pixels` and `frechet` belong to the whole set and have none. A
difference whose interval excludes 0 is bold; those of shares are in percentage points. Finished
options are kept under FOLDER, one JSON each: the same command goes on, and with all of them there
it only prints the tables.

    python -m bench.fewer_calls FOLDER [--split val]    about three minutes an option on two cores
    python -m bench.fewer_calls examples/fewer_calls    the tables of docs/, from their records
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from common.files import write_json
from guidance import Guidance, guidance_steps
from ltx.checkpoint import read_metadata
from model import ltx_sigmas
from study import scores
from study.evaluate import cell
from study.results import COLUMNS, SHARES, markdown

ROOT = Path(__file__).resolve().parents[1]
STREAMS, ROW = 3, "own reference"
OPTIONS = {  # name -> (lowest, highest sigma, every so many steps)
    "all streams in every step": (0.0, 1.0, 1),
    "every 2nd step": (0.0, 1.0, 2),
    "every 3rd step": (0.0, 1.0, 3),
    "every 4th step": (0.0, 1.0, 4),
    "sigma 0.5 and above": (0.5, 1.0, 1),
    "sigma 0.7 and above": (0.7, 1.0, 1),
    "sigma 0.9 and above": (0.9, 1.0, 1),
    "sigma 0.9 and below": (0.0, 0.9, 1),
    "sigma 0.5 and above, every 2nd step": (0.5, 1.0, 2),
    "sigma 0.3 and above, every 2nd step": (0.3, 1.0, 2),
    "sigma 0.2 and above, every 2nd step": (0.2, 1.0, 2),
    "one stream": (0.0, 0.0, 1),  # no step begins at 0
}


def measure(name: str, folder: Path, words: list[str]) -> dict:
    """The record of study.evaluate for an option; made if it is not there."""
    path = folder.absolute() / f"{name.replace(' ', '_').replace(',', '')}.json"
    if not path.exists():
        low, high, every = map(str, OPTIONS[name])
        clips = path.parent / "clips"
        clips.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "study.evaluate", "--rows", ROW,
                        "--guide-range", low, high, "--guide-every", every, "--folder", str(clips),
                        "--output-path", str(clips / path.name), *words],
                       cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        record = json.loads((clips / path.name).read_text())
        write_json(path, record | {"rows": {ROW: record["rows"][ROW]}})
    return json.loads(path.read_text())


def difference(name: str, record: dict, base: dict) -> str:
    """One score, as mine - base with its interval."""
    rows = [r["rows"][ROW] for r in (record, base)]
    if name in rows[0]["per_clip"]:
        mine, other = (torch.tensor([float("nan") if v is None else v
                                     for v in row["per_clip"][name]]) for row in rows)
        mean, half = scores.summarise(mine - other)
    else:
        mine, other = (row["scores"][name][0] for row in rows)
        mean, half = mine - other, None
    factor, digits = (100, 1) if name in SHARES else (1, 5 if name == "flicker" else 4)
    interval = "" if half is None else f" ± {factor * half:.{digits}f}"
    text = f"{factor * mean:+.{digits}f}{interval}"
    return f"**{text}**" if half is not None and abs(mean) > half else text


def calls(name: str, base: dict) -> float:
    """Calls of the model in a step, on average."""
    checkpoint = ROOT / base["arguments"]["checkpoint_path"]
    config = read_metadata(checkpoint)["config"]["inference"]
    sigmas = ltx_sigmas(config["steps"], config["schedule_tokens"])
    low, high, every = OPTIONS[name]
    steps = guidance_steps(sigmas, Guidance(interval=(low, high), every=every))
    return sum(STREAMS if step == "all" else 1 for step in steps) / config["steps"]


def main() -> int:
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    records = {name: measure(name, folder, words)
               for name in tqdm(OPTIONS, desc="options", unit="option")}
    base = records["all streams in every step"]
    for group in COLUMNS:
        rows = []
        for name, record in records.items():
            row = record["rows"][ROW]
            told = [cell(c, *row["scores"][c]) if record is base else difference(c, record, base)
                    for c in group]
            rows.append([name, f"{calls(name, base):.2f}", f"{row['seconds']:.0f}", *told])
        head = ["streams", "calls per step", "seconds", *(c.replace("_", " ") for c in group)]
        print("\n".join([*markdown(head, rows), ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
