"""The speed tables are printed, with our numbers equal to diffusers'; nothing is said of the times.

Hardware: CPU, some seconds. Run: python -m pytest tests/test_bench.py
"""

import pytest
import torch

pytest.importorskip("diffusers", reason="the second implementation is not installed")

from bench import speed
from model import TransformerConfig


@torch.no_grad()
def test_every_table_of_the_benchmark_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(speed, "TRANSFORMERS", [(48, 2, (2, 2, 3), 1, 1)] * 3)
    monkeypatch.setattr(speed, "matrix_rate", lambda dtype, device, size: 1e9)
    speed.transformer_rows("cpu", quick=True)
    speed.guided_rows("cpu", quick=True)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| 48, ")]
    assert len(rows) == 2 * 2 + 2, rows
    differences = [float(row.split("|")[-2]) for row in rows[:4]]
    assert max(differences[:2]) < 1e-5 and max(differences[2:]) < 0.1, "float32, then bf16"


@torch.no_grad()
def test_the_full_size_run_for_a_card_works_on_a_small_model(capsys):
    small = TransformerConfig(num_layers=3, heads=2, head_dim=12)
    speed.full_size(small, (2, 2, 3), "cpu", size=64)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("|") for line in lines if line.startswith(("| resident", "| --offload"))]
    assert [row[1].strip() for row in rows] == ["resident", "resident fp8-cast", "--offload cpu",
                                                "--offload cpu fp8-cast"]
