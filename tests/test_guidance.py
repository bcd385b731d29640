"""Three-stream guidance: what each dial does, what it costs, and where it is off.

No model, no weights: the four streams are random tensors and a counter. CPU, under a second.
Run: python -m pytest tests/test_guidance.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guidance import BOTH, COLORS, EXAMPLE, NULL, ORDERS, REF, TEXT, draw, guide, stream_weights

CHAINS = ("text_first", "reference_first")
scales = st.floats(-1.0, 8.0, allow_nan=False)


class Streams:
    """Four fixed predictions that write down who was asked for."""

    def __init__(self, seed=0, dtype=torch.float64):
        generator = torch.Generator().manual_seed(seed)
        self.values = {s: torch.randn(2, 6, 3, generator=generator, dtype=dtype) for s in (NULL, TEXT, REF, BOTH)}
        self.calls = []

    def __call__(self, text, ref):
        self.calls.append((text, ref))
        return self.values[text, ref]


def assert_close(a, b, tolerance=1e-12):  # float64 sums of three terms: a few ulp of numbers near 10
    difference = (a - b).abs().max().item()
    assert difference <= tolerance, f"largest difference {difference:.3g}"


def written_out(v, s_t, s_r, order):
    """The formulas as the docstring prints them, brackets and all: the second route to one answer."""
    if order == "text_first":
        return v[NULL] + s_t * (v[TEXT] - v[NULL]) + s_r * (v[BOTH] - v[TEXT])
    if order == "reference_first":
        return v[NULL] + s_r * (v[REF] - v[NULL]) + s_t * (v[BOTH] - v[REF])
    return v[BOTH] + (s_t - 1) * (v[BOTH] - v[REF]) + (s_r - 1) * (v[BOTH] - v[TEXT])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_at_one_one_guidance_is_the_plain_conditional_prediction_bit_for_bit_and_costs_one_call(order, rescale):
    streams = Streams(dtype=torch.bfloat16)
    result = guide(streams, 1.0, 1.0, order=order, rescale=rescale)
    assert result is streams.values[BOTH]
    assert streams.calls == [BOTH]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("s_t", "s_r"), [(3.0, 2.0), (2.0, 3.0), (1.0, 4.0), (4.0, 1.0), (0.0, 2.0), (5.0, 0.0)])
def test_the_weighted_sum_equals_the_formula_written_out(order, s_t, s_r):
    streams = Streams()
    assert_close(guide(streams, s_t, s_r, order=order), written_out(streams.values, s_t, s_r, order))


@pytest.mark.parametrize("order", CHAINS)
@pytest.mark.parametrize("scale", [0.5, 2.0, 3.3])
def test_equal_scales_in_a_chain_give_plain_cfg_of_both_against_neither(order, scale):
    streams = Streams()
    v0, vrt = streams.values[NULL], streams.values[BOTH]
    assert_close(guide(streams, scale, scale, order=order), v0 + scale * (vrt - v0))
    assert streams.calls == [BOTH, NULL], "the middle stream cancels and must not be run"


@pytest.mark.parametrize("order", CHAINS)
def test_zero_zero_in_a_chain_gives_the_unconditional_prediction(order):
    streams = Streams()
    assert guide(streams, 0.0, 0.0, order=order) is streams.values[NULL]
    assert streams.calls == [NULL]


def test_text_first_without_reference_scale_is_the_base_models_text_guidance():
    streams = Streams()
    v0, vt = streams.values[NULL], streams.values[TEXT]
    assert_close(guide(streams, 3.0, 0.0), v0 + 3 * (vt - v0))
    assert all(not ref for _, ref in streams.calls), "no stream with reference tokens may run"


@pytest.mark.parametrize("order", ORDERS)
def test_the_result_is_linear_in_each_scale(order):
    streams = Streams()

    def at(s_t, s_r):
        return guide(streams, s_t, s_r, order=order)

    assert_close(at(2.5, 3.0), (at(1.0, 3.0) + at(4.0, 3.0)) / 2)
    assert_close(at(3.0, 2.5), (at(3.0, 1.0) + at(3.0, 4.0)) / 2)


@given(s_t=scales, s_r=scales, order=st.sampled_from(ORDERS))
def test_the_weights_sum_to_one(s_t, s_r, order):
    total = sum(stream_weights(s_t, s_r, order).values())
    assert abs(total - 1) < 1e-12, total


@settings(deadline=None)  # the first tensor operation of a process can be slow
@given(s_t=scales, s_r=scales, order=st.sampled_from(ORDERS))
def test_a_stream_of_zero_weight_is_never_run_and_no_stream_runs_twice(s_t, s_r, order):
    streams = Streams()
    guide(streams, s_t, s_r, order=order)
    weights = stream_weights(s_t, s_r, order)
    assert 0 not in weights.values()
    assert streams.calls == list(weights)
    assert len(weights) <= 3, "three streams, not four"


def test_velocities_and_clean_estimates_give_the_same_answer():
    streams, x_s, sigma = Streams(), torch.randn(2, 6, 3, dtype=torch.float64), 0.7
    from_velocity = x_s - sigma * guide(streams, 3.0, 2.0)
    from_estimate = guide(lambda t, r: x_s - sigma * streams(t, r), 3.0, 2.0)
    assert_close(from_velocity, from_estimate)


def test_the_text_dial_leaves_alone_what_only_the_reference_changes():
    def predict(text, ref):  # first number: the prompt's doing, second: the reference's
        return torch.tensor([1.0 * text, 1.0 * ref])

    for order in ORDERS:
        assert guide(predict, 5.0, 2.0, order=order).tolist() == [5.0, 2.0], order


def test_full_rescale_restores_the_spread_of_the_conditional_prediction():
    streams = Streams()
    plain, rescaled = guide(streams, 6.0, 4.0), guide(streams, 6.0, 4.0, rescale=1.0)
    assert plain.std() > 1.5 * streams.values[BOTH].std(), "the example should have something to repair"
    assert_close(rescaled.std(), streams.values[BOTH].std())
    assert_close(rescaled / plain, (rescaled / plain).mean().expand_as(plain), 1e-9)  # one factor for all


def test_half_rescale_follows_the_ltx_formula():
    streams = Streams()
    plain, c = guide(streams, 3.0, 2.0), streams.values[BOTH]
    assert_close(guide(streams, 3.0, 2.0, rescale=0.5), plain * (0.5 * c.std() / plain.std() + 0.5))


def test_rescale_without_reference_measures_against_the_text_stream_and_runs_nothing_more():
    streams = Streams()
    v0, vt = streams.values[NULL], streams.values[TEXT]
    plain = v0 + 3 * (vt - v0)
    assert_close(guide(streams, 3.0, 0.0, rescale=0.7), plain * (0.7 * vt.std() / plain.std() + 0.3))
    assert streams.calls == [TEXT, NULL]


@pytest.mark.parametrize("kwargs", [{"order": "face_first"}, {"text_scale": float("nan")}, {"rescale": 1.5}])
def test_nonsense_is_refused_before_the_model_runs(kwargs):
    streams = Streams()
    with pytest.raises(ValueError, match="expected"):
        guide(streams, **kwargs)
    assert streams.calls == []


def test_the_perturbed_arrow_is_the_base_models_own_and_starts_at_the_most_conditioned_stream():
    """With a reference scale of 0 and one scale for text, the sum is LTX-2.3's cfg + stg, rescale included."""
    from model import ltx_guidance

    streams, perturbed = Streams(), torch.randn(2, 6, 3, dtype=torch.float64)
    asked = []

    def perturb(text, ref):
        asked.append((text, ref))
        return perturbed

    for rescale in (0.0, 0.7):
        v = streams.values
        expected = ltx_guidance(v[TEXT], v[NULL], perturbed, cfg=3.0, stg=1.0, rescale=rescale)
        assert_close(guide(streams, 3.0, 0.0, rescale=rescale, stg_scale=1.0, perturb=perturb), expected, 1e-5)
    assert_close(guide(streams, 3.0, 2.0, stg_scale=0.5, perturb=perturb),
                 guide(streams, 3.0, 2.0) + 0.5 * (v[BOTH] - perturbed))  # fmt: skip
    assert asked == [TEXT, TEXT, BOTH]
    streams.calls.clear()
    assert_close(guide(streams, 1.0, 1.0, stg_scale=1.0, perturb=perturb), 2 * v[BOTH] - perturbed)
    assert streams.calls == [BOTH], "one stream and its perturbed copy"
    with pytest.raises(ValueError, match="perturb"):
        guide(streams, 3.0, 2.0, stg_scale=1.0)


def test_the_picture_has_a_dot_where_the_formula_ends_and_its_arrows_lead_there():
    v = {stream: torch.tensor(point, dtype=torch.float64) for stream, point in EXAMPLE.items()}
    s_t, s_r = 2.5, 1.75
    picture = draw(scales=[(0.5, 1.25), (s_t, s_r)])
    assert picture.size == (1590, 450)

    def pixel(panel, point):
        return picture.getpixel((round(530 * panel + 72 + 78 * point[0].item()), round(420 - 78 * point[1].item())))

    for panel, order in enumerate(ORDERS):
        for pair in ((0.5, 1.25), (s_t, s_r)):
            assert pixel(panel, written_out(v, *pair, order)) == (0, 0, 0), f"{order}: no black dot for {pair}"
        text_first = {"text_first": s_t * (v[TEXT] - v[NULL]), "two_deltas": v[BOTH] + (s_t - 1) * (v[BOTH] - v[REF])}
        corner = text_first.get(order, s_r * v[REF])                      # where the first arrow of the path ends
        end = written_out(v, s_t, s_r, order)
        start = v[BOTH] if order == "two_deltas" else v[NULL]
        colors = COLORS[::-1] if order == "reference_first" else COLORS
        assert pixel(panel, 0.2 * start + 0.8 * corner) == colors[0], f"{order}: first arrow"
        assert pixel(panel, 0.5 * corner + 0.5 * end) == colors[1], f"{order}: second arrow"
