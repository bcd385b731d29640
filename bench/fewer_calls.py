"""What guidance costs when not every stream is run in every step, and what that does to every score.

Every option generates the same clips (256 people, one prompt each, same noise) as three streams in every step do, so
each score is compared clip by clip: the interval (95 %) is that of the difference. `pose`, `position`, `pixels` and
`frechet` belong to the whole set and have none. A difference whose interval excludes 0 is bold; those of shares are in
percentage points. Finished options are kept under FOLDER, one JSON each: the same command goes on, and with all of them
there it only prints the tables.

    python -m bench.fewer_calls FOLDER [--split val] [--people 256]           about three minutes an option on two cores
    python -m bench.fewer_calls examples/fewer_calls                          the README's, from its records
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]

from common.files import atomic_write
from denoise import forwards, guidance_steps
from ltx.checkpoint import read_metadata
from model import ltx_sigmas
from study import scores
from study.evaluate import cell
from study.results import COLUMNS, SHARES, markdown

STREAMS = 3
OPTIONS = {  # name -> (guide_range, guide_every)
    "all streams in every step": ((0.0, 1.0), 1),
    "every 2nd step": ((0.0, 1.0), 2),
    "every 3rd step": ((0.0, 1.0), 3),
    "every 4th step": ((0.0, 1.0), 4),
    "sigma 0.5 and above": ((0.5, 1.0), 1),
    "sigma 0.7 and above": ((0.7, 1.0), 1),
    "sigma 0.9 and above": ((0.9, 1.0), 1),
    "sigma 0.9 and below": ((0.0, 0.9), 1),
    "sigma 0.5 and above, every 2nd step": ((0.5, 1.0), 2),
    "sigma 0.3 and above, every 2nd step": ((0.3, 1.0), 2),
    "sigma 0.2 and above, every 2nd step": ((0.2, 1.0), 2),
    "one stream": ((0.0, 0.0), 1),  # no step begins at 0
}


def measure(name: str, folder: Path, words: list[str]) -> dict:
    """The record of evaluate.py for an option; made if it is not there."""
    path = folder / f"{name.replace(' ', '_').replace(',', '')}.json"
    if not path.exists():
        (low, high), every = OPTIONS[name]
        whole = folder / "clips" / path.name
        whole.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, str(ROOT / "study.evaluate"), "--rows", "own reference", "--guide-range", str(low),
                        str(high), "--guide-every", str(every), "--folder", str(whole.parent), "--output-path", str(whole),
                        *words], check=True, stdout=subprocess.DEVNULL)  # fmt: skip
        record = json.loads(whole.read_text())
        record["rows"] = {"own reference": record["rows"]["own reference"]}
        atomic_write(path, lambda beside: beside.write_text(json.dumps(record) + "\n"))
    return json.loads(path.read_text())


def difference(name: str, record: dict, base: dict) -> str:
    mine, other = (r["rows"]["own reference"] for r in (record, base))
    if name in mine["per_clip"]:
        pair = (torch.tensor([float("nan") if v is None else v for v in row["per_clip"][name]]) for row in (mine, other))
        mean, half = scores.summarise(next(pair) - next(pair))
    else:
        mean, half = mine["scores"][name][0] - other["scores"][name][0], None
    factor, digits = (100, 1) if name in SHARES else (1, 5 if name == "flicker" else 4)
    text = f"{factor * mean:+.{digits}f}" + ("" if half is None else f" ± {factor * half:.{digits}f}")
    return f"**{text}**" if half is not None and abs(mean) > half else text


def main() -> int:
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    records = {name: measure(name, folder, words) for name in tqdm(OPTIONS, desc="options", unit="option")}
    base = records["all streams in every step"]
    config = read_metadata(ROOT / base["arguments"]["checkpoint_path"])["config"]["inference"]
    sigmas = ltx_sigmas(config["steps"], config["schedule_tokens"])
    for group in COLUMNS:
        rows = []
        for name, record in records.items():
            calls = forwards(guidance_steps(sigmas, *OPTIONS[name]), STREAMS) / config["steps"]
            row = record["rows"]["own reference"]
            told = [cell(c, *row["scores"][c]) if record is base else difference(c, record, base) for c in group]
            rows.append([name, f"{calls:.2f}", f"{row['seconds']:.0f}", *told])
        head = ["streams", "calls per step", "seconds", *(c.replace("_", " ") for c in group)]
        print("\n".join([*markdown(head, rows), ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
