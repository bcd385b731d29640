"""The optimiser: Muon moves every direction equally far, the rate follows its schedule, EMA lags.

Hardware: CPU, a second. Run: python -m pytest tests/test_optim.py
"""

import pytest
import torch
from torch import nn

from common.seeds import seeded
from training.optim import EMA, MuonAdamW, orthogonalize, schedule, split_parameters


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_directions(shape):
    g = torch.randn(shape, generator=seeded(1))
    found = orthogonalize(g)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.35, values
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    aligned = (u.T @ found @ vt.T).diagonal()
    assert (aligned > 0.5).all(), "singular directions stay"


def step_of(parameter, gradients, muon, factor=1.0):
    """How far the last of several steps moves a parameter."""
    named, bias = {"w": parameter}, nn.Parameter(torch.zeros(1))
    optimizer = MuonAdamW(named, {"b": bias}) if muon else MuonAdamW({}, named)
    for gradient in gradients:
        before = parameter.detach().clone()
        parameter.grad = gradient
        optimizer.step(factor)
    return parameter.detach() - before


@pytest.mark.parametrize("shape", [(16, 16), (8, 64), (24, 4, 3, 3)])
def test_a_number_moves_about_as_far_under_muon_as_under_adamw_whatever_the_shape(shape):
    g = torch.randn(shape, generator=seeded(2))
    muon = step_of(nn.Parameter(torch.zeros(shape)), [g], True) / 3e-3
    adam = step_of(nn.Parameter(torch.zeros(shape)), [g], False) / 1e-3
    assert (muon * g).sum() < 0 and (adam * g).sum() < 0, "downhill"
    assert 0.15 < muon.square().mean().sqrt() < 0.25, "AdamW's usual size, not that of its start"


def test_muon_remembers_the_gradients_before():
    a, b = (torch.randn(6, 6, generator=seeded(k)) for k in (3, 4))
    once = step_of(nn.Parameter(torch.zeros(6, 6)), [b], True)
    after = step_of(nn.Parameter(torch.zeros(6, 6)), [*[a] * 30, b], True)
    toward = -orthogonalize(a).flatten()
    near, far = (torch.cosine_similarity(x.flatten(), toward, dim=0) for x in (after, once))
    assert near > far + 0.3, (near, far)


@pytest.mark.parametrize("muon", [True, False])
def test_the_factor_multiplies_both_rates(muon):
    g = torch.randn(5, 5, generator=seeded(5))
    whole, half = (step_of(nn.Parameter(torch.zeros(5, 5)), [g], muon, f) for f in (1.0, 0.5))
    assert torch.allclose(half, whole / 2, rtol=1e-4) and whole.abs().min() > 0


def test_matrices_go_to_muon_and_what_is_kept_out_to_adamw():
    named = {"block.w": torch.zeros(2, 2), "block.bias": torch.zeros(2),
             "conv.w": torch.zeros(2, 2, 1, 1), "proj_out.w": torch.zeros(2, 2)}
    matrices, others = split_parameters(named, ("proj_out",))
    assert list(matrices) == ["block.w", "conv.w"] and list(others) == ["block.bias", "proj_out.w"]


def test_a_loaded_optimiser_takes_the_same_next_step():
    def fresh():
        named = {"m": nn.Parameter(torch.ones(4, 4)), "b": nn.Parameter(torch.ones(4))}
        return named, MuonAdamW({"m": named["m"]}, {"b": named["b"]})

    def step(named, optimizer, k):
        for p in named.values():
            p.grad = torch.randn(p.shape, generator=seeded(6, k))
        optimizer.step()
    (a, first), (b, second) = fresh(), fresh()
    step(a, first, 0)
    second.load({k: v.clone() for k, v in first.state().items()})
    for name in a:
        b[name].data.copy_(a[name].data)
    step(a, first, 1)
    step(b, second, 1)
    assert all(torch.equal(a[name], b[name]) for name in a)
    fresh()[1].load(fresh()[1].state())  # nothing remembered yet


# ------------------------------------------------------------ the rate over a run


def test_the_rate_warms_up_stays_and_falls_to_its_final_share():
    rates = [schedule(step, 1000, warmup=100, decay=0.5, final=0.1) for step in range(1000)]
    assert rates[0] == 0.01 and rates[49] == pytest.approx(0.5) and rates[99] == 1, "warm-up"
    assert all(rate == 1 for rate in rates[99:501]) and rates[501] < 1, "flat until half is left"
    assert rates[750] == pytest.approx(0.55), "halfway between 1 and 0.1"
    assert 0.1 < rates[999] < 0.102
    assert schedule(1000, 1000, decay=0.5, final=0.1) == pytest.approx(0.1)


def test_the_rate_is_constant_without_decay_and_never_above_one():
    assert {schedule(step, 100, warmup=1, final=1.0) for step in range(100)} == {1.0}
    assert {schedule(step, 100, warmup=0, decay=0.0) for step in range(100)} == {1.0}
    assert max(schedule(step, 50, warmup=100, decay=1.0) for step in range(50)) <= 0.5, "both ends"
    assert schedule(500, 100, final=0.0) == 0, "beyond the end"


# ------------------------------------------------------------ averages


def test_the_average_lags_and_a_young_one_forgets_its_start():
    named = {"w": torch.zeros(1)}
    ema = EMA(named, decay=0.9)
    named["w"] += 1  # in place, as training does: the shadow is a copy
    ema.update(named, 0)
    assert ema.shadow["w"].item() == pytest.approx(0.9), "at first a tenth of the old is kept"
    ema = EMA({"w": torch.zeros(1)}, decay=0.9)
    ema.update(named, 1000)
    assert ema.shadow["w"].item() == pytest.approx(0.1)
