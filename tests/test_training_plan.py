"""What a step of training takes and how long: counted, added up, said. test_fake_cuda.py measures.

Hardware: CPU, seconds. Run: python -m pytest tests/test_training_plan.py
"""

from argparse import Namespace

import pytest
import torch
from test_offload import inputs
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train
from clips.frames import Bucket
from ltx import plan as p
from model import TransformerConfig, VideoTransformer
from training import plan as t

ARGS = Namespace(rank=32, w_id=0.1)


@pytest.fixture(scope="module")
def official():
    return t.training_plan(p.REAL, Bucket(512, 768, 121), ARGS)


def total(plan: t.TrainingPlan, option: str) -> float:
    """GB without the allowance."""
    return (sum(plan.needs[option].values()) - p.RESERVE) / 1e9


def test_the_official_size_fits_35_23_and_10_gigabytes(official):
    """Plain, in one byte, streamed; identity loss on, a face of half the picture's height."""
    sums = {option: total(official, option) for option in t.OPTIONS}
    assert 33 < sums["no flag"] < 35, sums
    assert 21 < sums["--quantization fp8-cast"] < 23, sums
    assert 9 < sums["--offload cpu"] < 10.1 < sums["--offload disk"] < 10.7, sums
    assert official.sizes["n"] == 6528 and official.sizes["A"] == 163_577_856
    needs = official.needs["--quantization fp8-cast"]
    assert needs["blocks"] == pytest.approx(4 * 537.6e6 + 44 * 269.1e6, rel=1e-3)
    assert official.copied["--offload cpu"] == 2 * 48 * 537_624_704
    assert official.copied["no flag"] == 0


def test_the_identity_loss_and_the_size_of_the_clip_are_paid_for_where_they_are(official):
    without = t.training_plan(p.REAL, Bucket(512, 768, 121), Namespace(rank=32, w_id=0.0))
    small = t.training_plan(p.REAL, Bucket(512, 512, 25), ARGS)
    assert "recogniser" not in without.needs["no flag"] and without.flops < official.flops
    assert total(without, "no flag") < total(official, "no flag") - 0.5
    assert small.needs["no flag"]["blocks"] == official.needs["no flag"]["blocks"]
    shares = [plan.needs["no flag"]["inputs of all blocks"] for plan in (small, official)]
    assert shares[1] / shares[0] == 6528 / 1280


def test_the_operations_of_a_step_are_those_that_a_small_model_does():
    """Forward, forward again, backward to the inputs. PyTorch's plain attention multiplies four
    matrices backward where a card's kernel, which the plan counts, multiplies five."""
    sizes = TransformerConfig(in_channels=8, out_channels=8, num_layers=3, heads=4, head_dim=24)
    model, batch = VideoTransformer(sizes).requires_grad_(False), inputs(sizes, (5, 8, 8))
    model.gradient_checkpointing = True
    batch["latent"].requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**batch).sum().backward()
    letters = {"K": 3, "D": 96, "h": 4, "C": 8, "b": 4, "N": 5, "n": 384, "U": 2}
    scores = sum(flops for name, flops in p.compute(p.PASS, letters).items() if "scores" in name)
    expected = t.step_flops(letters) - 0.5 * scores
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("flops", "tflops", "said"), [
    (10**15, 100, "take 10.0 seconds at 100 TFLOP/s (as given)"),
    (3600 * 10**14, 100, "take 60.0 minutes at 100 TFLOP/s (as given)"),
    (3 * 86400 * 10**14, 100.0, "take 3.0 days at 100 TFLOP/s (as given)"),
    (10**15, None, "take as long as the card decides: give its rate with --tflops")])
def test_how_long_it_takes_is_said_in_a_unit_that_can_be_read(monkeypatch, flops, tflops, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert p.duration(flops, tflops) == said


def test_the_rate_of_a_card_that_is_there_is_measured_and_said_to_be(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(p, "card_rate", lambda: 500e12)
    seconds, share = 10 / p.REACHED, f"{p.REACHED:.0%} of a matrix product's here"
    rate = f"{p.REACHED * 500:g} TFLOP/s"
    assert p.duration(5 * 10**15, None) == f"take {seconds:.1f} seconds at {rate} ({share})"


def test_the_command_prints_every_option_and_size_and_loads_nothing(capsys):
    words = ["--plan", "--tflops", "400", "--buckets", "512x512x25,256x256x1", "--steps", "1000"]
    assert train.main(words) == 0
    printed = capsys.readouterr().out
    assert "512x512x25: K=48" in printed and "256x256x1: K=48" in printed
    assert "1000 steps take" in printed and "at 400 TFLOP/s (as given)" in printed
    for option in t.OPTIONS:
        assert printed.count(f"| {option} | ") == 2
    assert train.main([*words, "--buckets", "100x100x9"]) == 2
    assert "expected sides that are multiples of 32" in capsys.readouterr().err


def test_a_file_is_planned_from_its_own_header(capsys):
    tiny = str(p.BUNDLED)
    assert train.main(["--plan", "--checkpoint-path", tiny, "--buckets", "64x64x9"]) == 0
    assert f"{tiny}, a LoRA of rank 32" in (printed := capsys.readouterr().out)
    assert "64x64x9: K=6 D=192" in printed
