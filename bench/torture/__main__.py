"""Everything that users, disks and the plug do to the commands, and what each command said.

    python -m bench.torture                 # all cases and faults, minutes
    python -m bench.torture --quick         # a representative part, under 50 s
    python -m bench.torture --only "PNG"    # those whose name contains it

Prints one table with a row for each case (harness.py says what a case is) and each fault
(faults.py), then how much was tried, survived and lost. Exit status 1 if a row is not as expected.

Read next: bench/torture/harness.py
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from bench.torture import clips, faults, inputs
from bench.torture.harness import Case, Row, run_case, warm_up


def run_fault(name: str, fault: Callable[[Path], Row]) -> Row:
    with tempfile.TemporaryDirectory(prefix="torture-") as place:
        start = time.perf_counter()
        try:
            row = fault(Path(place))
        except Exception as error:
            traceback.print_exc()
            row = Row(name, "", "", 1, "", False, why=f"the fault itself failed: {error!r}")
    return replace(row, seconds=time.perf_counter() - start)


def cell(text: object, width: int) -> str:
    """Text that stays one cell of a Markdown table."""
    line = " ".join(str(text).split()).replace("|", "/")
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if len(line) <= width else line[: width - 3] + "..."


def print_row(row: Row, width: int) -> None:
    cells = [cell(row.case, 60), cell(row.command, width), cell(row.line, 2 * width),
             str(row.status), cell(row.files, 60)]
    end = "" if row.good else f" <- NOT AS EXPECTED: {row.why}"
    print("| " + " | ".join(cells) + " |" + end, flush=True)


def counts(cases: list[Row], injected: list[Row]) -> str:
    """The last lines: how much was tried, how much was survived, how much was lost."""
    refused, works = (sum(row.status == status for row in cases) for status in (2, 0))
    other = len(cases) - refused - works
    kinds = Counter()
    for row in injected:
        kinds[row.case.partition(":")[0]] += row.count
    told = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    kills = sum(row.count for row in injected if row.case.startswith("SIG") and row.good)
    return (f"bad inputs tried: {len(cases)} ({refused} refused, {works} work"
            f"{f', {other} with another status' if other else ''})\n"
            f"faults injected: {sum(kinds.values())}{f' ({told})' if told else ''}\n"
            f"kills survived: {kills}\n"
            f"bytes lost: {sum(row.lost for row in cases + injected)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="a representative part, under 50 s")
    add("--only", default="", metavar="TEXT", help="cases and faults whose name contains it")
    add("--refused", action="store_true",
        help="for the tests: every second input that is refused at once, no faults")
    add("--width", type=int, default=70, help="of the command's column (default: %(default)s)")
    add("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    start = time.perf_counter()
    cases = [case for case in [*inputs.CASES, *clips.CASES]
             if (case.quick or not args.quick) and args.only in case.name]
    if args.refused:
        cases = [case for case in cases if case.status == 2 and case.seconds <= Case.seconds][::2]
    chosen = [(name, fault) for name, fault, quick in faults.FAULTS
              if (quick or not args.quick) and args.only in name and not args.refused]
    if cases:
        warm_up()
    print("| case | command | printed line | status | files left |\n|---|---|---|---|---|")
    tried: list[Row] = []
    injected: list[Row] = []
    for case in cases:
        tried.append(run_case(case))
        print_row(tried[-1], args.width)
    for name, fault in chosen:
        injected.append(run_fault(name, fault))
        print_row(injected[-1], args.width)
    wrong = sum(not row.good for row in tried + injected)
    print(f"\n{counts(tried, injected)}\nnot as expected: {wrong}\n"
          f"seconds: {time.perf_counter() - start:.0f}")
    if args.json:
        rows = [asdict(row) for row in tried + injected]
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
