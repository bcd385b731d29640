"""The torture table: its quick refusals hold, and it would notice if they did not.

Shown: every second quick case that is refused at once is refused as the table says (bad pictures,
numbers, outputs, weights, manifests ...), and the harness finds each kind of misbehaviour in a
command made for that purpose. The rest, and faults, are only in `python -m bench.torture`.
Hardware: CPU, about 8 s. Run: python -m pytest tests/test_torture.py
"""

import json
import subprocess
import sys
from pathlib import Path

from bench.torture.harness import ROOT, Case, Row, run_case


def test_quick_bad_inputs_are_refused_in_one_line_and_leave_nothing(tmp_path):
    """In a process of its own: a fork of pytest would inherit other tests' threads."""
    words = [sys.executable, "-m", "bench.torture", "--quick", "--refused", "--json",
             str(tmp_path / "rows.json")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=600)
    rows = [Row(**row) for row in json.loads((tmp_path / "rows.json").read_text())]
    assert not [f"{row.case}: {row.why}; {row.line}" for row in rows if not row.good]
    assert done.returncode == 0 and len(rows) >= 30, done.stderr
    assert f"bad inputs tried: {len(rows)} ({len(rows)} refused, 0 work)" in done.stdout
    assert "bytes lost: 0" in done.stdout and "not as expected: 0" in done.stdout
    table = done.stdout.split("\n\n")[0].splitlines()
    assert all(line.count("|") == 6 for line in table), "one cell stays one cell"


GOOD = "print('liar.py: error: expected this, got that; do so', file=sys.stderr); return 2"
LIES = {
    "a file that was not announced": ("open('out/half.mp4', 'w').close(); " + GOOD,
                                      "files in out/: half.mp4"),
    "a file beside out/": ("open('stray', 'w').close(); " + GOOD, "new outside out/: stray"),
    "a file that was there and is now empty": ("open('precious', 'w').close(); " + GOOD,
                                               "changed or gone: precious"),
    "a file that was there and is gone": ("os.remove('precious'); " + GOOD,
                                          "changed or gone: precious"),
    "a traceback": ("raise RuntimeError('a mistake of ours')", "a traceback"),
    "success, although it should have refused": ("return 0", "status 0, not 2"),
    "no word at all": ("return 2", "0 error lines"),
    "two error lines": ("print('x: error: a; b', file=sys.stderr); " + GOOD, "2 error lines"),
    "another error": (GOOD.replace("that", "something else"), "does not say 'got that'"),
    "a line that does not say what to do": (GOOD.replace("; do so", ""), "what to do"),
    "a line that steers the terminal": (GOOD.replace("do so", "\\x1b[2J"), "not one short line"),
    "a line as long as its input": (GOOD.replace("do so", "x' + 999 * 'x"), "not one short line"),
    "a library's warning": ("print('lib.py:7: UserWarning: old', file=sys.stderr); " + GOOD,
                            "a library's warning"),
    "a hang": ("\n    while True: pass", "status 152, not 2"),
    "more memory than it may have": ("bytes(10**9); " + GOOD, "a traceback"),
}


def liar(folder: Path, name: str, body: str) -> Row:
    """Run a command that does `body`, as a case that should be refused."""
    (folder / f"{name}.py").write_text(f"import os, sys\ndef main(arguments):\n    {body}\n")

    def command(scratch: Path) -> list[str]:
        (scratch / "precious").write_text("ten bytes.")
        return [f"{name}.py"]
    return run_case(Case("a lie", command, says="got that", seconds=1, memory_gb=0.5))


def test_the_harness_notices_every_lie_and_complains_of_nothing_else(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    row = liar(tmp_path, "honest", GOOD)
    assert row.good and row.lost == 0 and row.files == "-", row
    assert row.line == "liar.py: error: expected this, got that; do so"
    for i, (lie, (body, complaint)) in enumerate(LIES.items()):
        row = liar(tmp_path, f"liar_{i}", body)
        assert not row.good and complaint in row.why, (lie, row)
        assert row.lost == (10 if "was there" in lie else 0), lie
