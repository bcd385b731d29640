"""Every command ends in one way: one line, and a status that says who can mend it.

Hardware: CPU, a second. Run: python -m pytest tests/test_cli.py
"""

import os
import signal
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path

import pytest

from common.cli import Parser, check_file, check_folder, check_ranges, command, signals

ROOT = Path(__file__).resolve().parent.parent
BUFFERED = os.environ | {"PYTHONUNBUFFERED": ""}  # as Python is unless somebody says otherwise


def raising(error: BaseException):
    def work():
        raise error
    return work


def test_a_mistake_on_the_command_line_is_one_short_line(capsys):
    parser = Parser("x.py")
    parser.add_argument("--steps", type=int)
    for words in (["--steps", "many"], ["--steps", "x" * 10_000], ["--\x1b[2Jstep", "1"]):
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args(words)
        line = capsys.readouterr().err
        assert stopped.value.code == 2 and line.count("\n") == 1 and line[:-1].isprintable()
        assert line.startswith("x.py: error: ") and line.endswith("; see x.py --help\n")
        assert len(line) < 600


def test_numbers_outside_their_range_are_refused_and_none_is_a_default():
    args = Namespace(a=None, b=[0.0, 1.0], c_d=2)
    check_ranges(args, {"a": (0, 1), "b": (0, 1), "c_d": (1, 2)})
    for value in (0, 3, float("nan"), float("inf")):
        args.c_d = value
        with pytest.raises(ValueError, match=f"expected --c-d between 1 and 2, got {value}; "):
            check_ranges(args, {"c_d": (1, 2)})
    args.b[1] = float("nan")
    with pytest.raises(ValueError, match="expected --b between 0 and 1, got nan; "):
        check_ranges(args, {"b": (0, 1)})


def test_a_folder_that_cannot_be_written_is_found_before_any_work_and_none_is_made(tmp_path):
    check_folder(tmp_path / "new" / "and" / "deep")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"expected a folder to write in, .*\(.*\); choose"):
            check_folder(folder)


def test_a_file_that_cannot_be_written_is_found_before_any_work(tmp_path):
    check_file(tmp_path / "new" / "a.JSON", ".json")
    (tmp_path / "folder.json").mkdir()
    for name in ("a.png", ".json", "", "folder.json"):
        with pytest.raises(ValueError, match="expected a file name that ends in .json, got .*; ch"):
            check_file(tmp_path / name, ".json")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected a folder to write in"):
        check_file(tmp_path / "file" / "a.json", ".json")


@pytest.mark.parametrize("main, status", [
    ("command('x.py', lambda: print('x' * 10**6))", 141),
    ("command('x.py', lambda: print('x'))", 141),
    ("Parser('x.py').parse_args(['--help'])", 0),
])
def test_a_reader_who_has_seen_enough_ends_a_command_without_a_word(main, status):
    """As `| head -1` does: what is printed last is flushed by Python when it ends."""
    code = ("import sys; from common.cli import Parser, command\n"
            f"sys.stdin.read(); sys.exit({main})")
    running = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=BUFFERED)
    running.stdout.close()
    _, told = running.stdin.close(), running.stderr.read()
    assert (running.wait(), told) == (status, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device here that is always full")
def test_a_full_disk_under_what_is_printed_is_one_line():
    code = "import sys; from common.cli import command; sys.exit(command('x.py', lambda: print(1)))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, text=True,
                              stderr=subprocess.PIPE, env=BUFFERED)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "No space left" in done.stderr


@pytest.mark.parametrize("error, line", [
    (ValueError("expected a, got b; do c"), "expected a, got b; do c"),
    (OSError(28, "No space left"), "[Errno 28] No space left; check that file and the free space"),
    (MemoryError(), "expected enough memory for this size, got too little; take fewer"),
    (RuntimeError("can't allocate memory"), "expected enough memory for this size, got too little"),
])
def test_what_a_user_can_mend_is_one_line_and_status_2(capsys, error, line):
    assert command("x.py", raising(error)) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"x.py: error: {line}") and told.count("\n") == 1


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes"):
        command("x.py", raising(RuntimeError("shapes do not match")))
    assert command("x.py", lambda: None) == 0


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_in_one_line_and_what_was_set_before_is_set_again(capfd, number, status):
    """Even while a progress bar is half-built: its `__del__` would print a traceback."""
    class Half:
        def __init__(self):
            signal.raise_signal(number)
            self.whole = True

        def __del__(self):
            self.whole.bit_length()  # AttributeError

    before = signal.getsignal(number), sys.unraisablehook
    assert command("x.py", Half, stopped="all is saved") == status
    assert capfd.readouterr().err == "x.py: stopped; all is saved\n"
    assert (signal.getsignal(number), sys.unraisablehook) == before


def test_outside_the_main_thread_signals_are_left_alone():
    done = []

    def work():
        with signals(lambda number, frame: None):
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
