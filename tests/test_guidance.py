"""Three-stream guidance: what each scale does, what it costs, and where it is off.

No model, no weights: the four streams are random tensors and a counter. CPU, a second.
Run: python -m pytest tests/test_guidance.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guidance import BOTH, NULL, ORDERS, REF, TEXT, Guidance, guidance_steps, guide, stream_weights

CHAINS = ("text_first", "reference_first")
scales = st.floats(-1.0, 8.0, allow_nan=False)


class Streams:
    """Four fixed predictions that write down who was asked for."""

    def __init__(self, dtype=torch.float64):
        g = torch.Generator().manual_seed(0)
        self.values = {s: torch.randn(2, 6, 3, generator=g, dtype=dtype)
                       for s in (NULL, TEXT, REF, BOTH)}
        self.perturbed = torch.randn(2, 6, 3, generator=g, dtype=dtype)
        self.calls = []

    def __call__(self, text, ref, skip_blocks=()):
        self.calls.append((text, ref))
        return self.perturbed if skip_blocks else self.values[text, ref]


def assert_close(a, b, tolerance=1e-12):  # float64 sums of a few terms near 10
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference:.3g}"


def written_out(v, s_t, s_r, order):
    """The formulas as the header prints them, brackets and all: the second route to one answer."""
    if order == "text_first":
        return v[NULL] + s_t * (v[TEXT] - v[NULL]) + s_r * (v[BOTH] - v[TEXT])
    if order == "reference_first":
        return v[NULL] + s_r * (v[REF] - v[NULL]) + s_t * (v[BOTH] - v[REF])
    return v[BOTH] + (s_t - 1) * (v[BOTH] - v[REF]) + (s_r - 1) * (v[BOTH] - v[TEXT])


@pytest.mark.parametrize("order", ORDERS)
def test_at_one_one_the_plain_conditional_prediction_comes_back_bit_for_bit_for_one_call(order):
    streams = Streams(dtype=torch.bfloat16)
    assert guide(streams, Guidance(1.0, 1.0, order, rescale=0.7)) is streams.values[BOTH]
    assert streams.calls == [BOTH]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("s_t", "s_r"), [(3, 2), (2, 3), (1, 4), (0, 2), (5, 0)])
def test_the_weighted_sum_equals_the_formula_written_out(order, s_t, s_r):
    streams = Streams()
    expected = written_out(streams.values, s_t, s_r, order)
    assert_close(guide(streams, Guidance(s_t, s_r, order)), expected)


@pytest.mark.parametrize("order", CHAINS)
def test_equal_scales_in_a_chain_give_plain_cfg_of_both_against_neither(order):
    streams = Streams()
    v0, vrt = streams.values[NULL], streams.values[BOTH]
    assert_close(guide(streams, Guidance(3.3, 3.3, order)), v0 + 3.3 * (vrt - v0))
    assert streams.calls == [BOTH, NULL], "the middle stream cancels and must not be run"
    assert guide(streams, Guidance(0.0, 0.0, order)) is streams.values[NULL]


def test_text_first_without_reference_scale_is_the_base_model_s_text_guidance():
    streams = Streams()
    v0, vt = streams.values[NULL], streams.values[TEXT]
    plain = v0 + 3 * (vt - v0)
    assert_close(guide(streams, Guidance(3.0, 0.0)), plain)
    rescaled = guide(streams, Guidance(3.0, 0.0, rescale=0.7))  # measured against the text stream
    assert_close(rescaled, plain * (0.7 * vt.std() / plain.std() + 0.3))
    assert all(not ref for _, ref in streams.calls), "no stream with reference tokens may run"


@settings(deadline=None)  # the first tensor operation of a process can be slow
@given(s_t=scales, s_r=scales, order=st.sampled_from(ORDERS))
def test_weights_sum_to_one_and_no_stream_is_run_in_vain(s_t, s_r, order):
    streams, guidance = Streams(), Guidance(s_t, s_r, order)
    weights = stream_weights(guidance)
    assert abs(sum(weights.values()) - 1) < 1e-12 and 0 not in weights.values()
    guide(streams, guidance)
    assert streams.calls == list(weights)
    assert len(weights) <= 3, "three streams, not four"


def test_velocities_and_clean_estimates_give_the_same_answer():
    streams, x_s, sigma = Streams(), torch.randn(2, 6, 3, dtype=torch.float64), 0.7
    from_velocity = x_s - sigma * guide(streams, Guidance(3.0, 2.0))
    assert_close(guide(lambda t, r: x_s - sigma * streams(t, r), Guidance(3.0, 2.0)), from_velocity)


def test_the_text_scale_leaves_alone_what_only_the_reference_changes():
    for order in ORDERS:  # first number: the prompt's doing, second: the reference's
        predict = lambda text, ref: torch.tensor([1.0 * text, 1.0 * ref])  # noqa: E731
        found = guide(predict, Guidance(5, 2, order))
        assert found.tolist() == [5.0, 2.0], order


def test_rescale_follows_the_ltx_formula_and_1_restores_the_conditional_spread():
    streams, c = Streams(), None
    plain, c = guide(streams, Guidance(6.0, 4.0)), streams.values[BOTH]
    assert plain.std() > 1.5 * c.std(), "the example should have something to repair"
    assert_close(guide(streams, Guidance(6.0, 4.0, rescale=1.0)).std(), c.std())
    half = guide(streams, Guidance(6.0, 4.0, rescale=0.5))
    assert_close(half, plain * (0.5 * c.std() / plain.std() + 0.5))


def test_the_perturbed_delta_starts_at_the_most_conditioned_stream():
    streams, v = Streams(), Streams().values
    expected = guide(streams, Guidance(3.0, 2.0)) + 0.5 * (v[BOTH] - streams.perturbed)
    streams.calls.clear()
    assert_close(guide(streams, Guidance(3.0, 2.0, stg_scale=0.5)), expected)
    assert streams.calls == [BOTH, TEXT, NULL, BOTH]
    one = guide(streams, Guidance(1.0, 1.0, stg_scale=1.0))
    assert_close(one, 2 * v[BOTH] - streams.perturbed)


@pytest.mark.parametrize("order", ORDERS)
def test_cached_deltas_are_laid_onto_the_new_first_stream(order):
    """Streams that move together from step to step are guided exactly, whatever was kept."""
    streams, deltas, guidance = Streams(), {}, Guidance(3.0, 2.0, order, every=3)
    for step in range(3):
        streams.calls.clear()
        moved = lambda t, r, step=step: streams(t, r) + 0.3 * step  # noqa: E731
        cheap = guide(moved, guidance, deltas)
        assert len(streams.calls) == (3 if step == 0 else 1)
        assert_close(cheap, guide(moved, guidance))


def test_a_step_belongs_to_the_interval_by_the_level_it_starts_from():
    sigmas = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    assert guidance_steps(sigmas, Guidance()) == ["all"] * 4
    assert guidance_steps(sigmas, Guidance(interval=(0.5, 0.75))) == ["one", "all", "all", "one"]
    some = Guidance(interval=(0.0, 0.75), every=2)
    assert guidance_steps(sigmas, some) == ["one", "all", "cached", "all"]
    assert guidance_steps(sigmas, Guidance(every=3)) == ["all", "cached", "cached", "all"]


@pytest.mark.parametrize("wrong", [{"order": "face_first"}, {"text_scale": float("nan")},
                                   {"rescale": 1.5}, {"interval": (0.8, 0.2)}, {"every": 0},
                                   {"interval": (float("nan"), 1.0)}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        Guidance(**wrong)
