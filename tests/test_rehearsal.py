"""The files of the full-size rehearsal: every name, numbers where they are read, holes elsewhere.

A rehearsal itself takes 60 GB and a quarter of an hour (docs/speed.md has one). Hardware: CPU,
seconds; Linux. Run: python -m pytest tests/test_rehearsal.py
"""

import os
import sys

import pytest
import torch
from safetensors.torch import load_file

from bench import official, rehearsal


def test_the_files_have_every_name_of_the_published_ones_up_to_the_layers_asked_for():
    names = official.video() | official.audio(official.ltx_config())
    assert rehearsal.kept_layers(names, 48) == names
    few = rehearsal.kept_layers(names, 2)
    assert {n.split(".")[3] for n in few if "_model.transformer_blocks." in n} == {"0", "1"}
    assert {n for n in names if "connector.transformer_1d_blocks.7." in n} <= set(few)
    text = official.table(official.GEMMA_PLAIN)
    assert len(rehearsal.kept_layers(text, 3)) == 2 + 3 * (len(text) - 2) // 48


def test_what_is_read_is_random_and_the_rest_takes_no_disk(tmp_path):
    rows = [("a.weight", torch.bfloat16, (512, 1024)), ("sound", torch.bfloat16, (2**24,)),
            ("q_norm.weight", torch.bfloat16, (64,)), ("std-of-means", torch.float32, (128,)),
            ("last", torch.bfloat16, (2**20,))]
    path, read = tmp_path / "x.safetensors", ["a.weight", "q_norm.weight", "std-of-means"]
    used = official.write_streamed(path, rows, {}, rehearsal.patterns(read), holes=True)
    assert used == 2 * 512 * 1024 + 2 * 64 + 4 * 128
    assert os.stat(path).st_blocks * 512 < 2 * used < path.stat().st_size
    found = load_file(path)
    assert not found["sound"].any() and not found["last"].any()
    assert abs(found["a.weight"].float().std() - 0.01) < 1e-4
    assert (found["q_norm.weight"] - 1).abs().max() < 0.1 and found["std-of-means"].min() > 0.9


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_process_itself_and_not_of_files_it_has_mapped(tmp_path):
    (tmp_path / "file").write_bytes(bytes(200_000_000))
    program = ("import mmap, sys, time; f = open(sys.argv[1], 'rb')\n"
               "m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); sum(m[::4096])\n"
               "b = bytearray(b'x') * int(sys.argv[2]); time.sleep(1); sys.exit(3)")
    little, much = (rehearsal.watched([sys.executable, "-c", program, str(tmp_path / "file"), size])
                    for size in ("1", "300000000"))
    assert little[0] == much[0] == 3
    assert little[1] < 1e8 and abs(much[1] - little[1] - 3e8) < 3e7
