"""sample.denoise: the loop written out by hand, what a stream sees, what is left out to save calls.

The weights are random. Hardware: CPU, a few seconds. Run: python -m pytest tests/test_denoise.py
"""

import pytest
import torch
from tiny import SIZES, livelier

from guidance import ORDERS, Guidance
from model import VideoTransformer, ltx_sigmas
from rope import Layout
from sample import denoise, denoise_steps

LAYOUT = Layout(2, 3, 2, 8.0, 4, 8)
L, R, C = 12, 6, SIZES.in_channels
SIGMAS = ltx_sigmas(3, 48)


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(1)
    return livelier(VideoTransformer(SIZES)).eval()


def inputs(batch: int = 1):
    """noise, context, null context, reference tokens."""
    g = torch.Generator().manual_seed(3)
    noise, tokens = (torch.randn(batch, n, C, generator=g) for n in (L, R))
    context, null = (torch.randn(batch, 8, SIZES.dim, generator=g) for _ in range(2))
    return noise, context, null, tokens


def run(transformer, *given, tokens=None, **options):
    """The video, and how many tokens each call of the model was given."""
    noise, context, null, usual = given or inputs()
    seen = []
    handle = transformer.register_forward_pre_hook(lambda _, i: seen.append(i[0].shape[1]))
    tokens = {None: usual, "none": None}.get(tokens, tokens) if not torch.is_tensor(tokens) \
        else tokens
    video = denoise(transformer, noise, SIGMAS, context, null, tokens, LAYOUT, Guidance(**options))
    handle.remove()
    return video, seen


def test_the_plain_loop_written_out_gives_the_same_video(transformer):
    """Two routes, one answer: three passes and one Euler step written out by hand."""
    found, seen = run(transformer, text_scale=3.0, ref_scale=2.0)
    assert seen == [L + R, L, L] * 3
    x, context, null, tokens = inputs()
    both = [LAYOUT.video_positions(), LAYOUT.reference_positions()]
    positions = torch.cat(both, dim=1)[None]
    with torch.no_grad():
        for s, s_next in zip(SIGMAS[:-1], SIGMAS[1:], strict=True):
            level = torch.full((1, L + R), s.item())
            level[:, L:] = 0  # the reference is clean at every step
            full = transformer(torch.cat([x, tokens], 1), level, s[None], positions, context)
            text, none = (transformer(x, level[:, :L], s[None], positions[:, :, :L], c)
                          for c in (context, null))
            velocity = none + 3.0 * (text - none) + 2.0 * (full[:, :L] - text)
            x = x + (s_next - s) * velocity
    difference = (found - x.transpose(1, 2).reshape(1, C, 2, 3, 2)).abs().max().item()
    assert difference < 1e-4, difference


def test_without_reference_scale_the_reference_is_ignored_bit_for_bit(transformer):
    plain, seen = run(transformer, ref_scale=0.0)
    assert plain.shape == (1, C, 2, 3, 2) and plain.dtype == torch.float32 and set(seen) == {L}
    other, _ = run(transformer, ref_scale=0.0, tokens=torch.full((1, R, C), 9.0))
    none, _ = run(transformer, tokens="none", ref_scale=5.0, order="two_deltas")
    assert torch.equal(plain, other) and torch.equal(plain, none)
    assert (plain - run(transformer, ref_scale=2.0)[0]).abs().max() > 1e-2


@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_of_two_equals_two_singles(transformer, order):
    noise, context, null, tokens = inputs(2)
    both, _ = run(transformer, noise, context, null, tokens, order=order)
    for i in range(2):
        one, _ = run(transformer, *(part[i : i + 1] for part in (noise, context, null, tokens)),
                     order=order)
        found = (both[i : i + 1] - one).abs().max().item()
        assert found < 1e-4, found  # other sums of the same numbers, rounded otherwise


def test_a_number_that_is_not_finite_stops_the_run_and_names_the_step(transformer):
    with pytest.raises(ValueError, match="step 1 of 3, got NaN or infinity; use --dtype float32"):
        run(transformer, tokens=torch.full((1, R, C), float("nan")))


def test_outside_the_interval_one_stream_with_all_conditions_is_run(transformer):
    video, seen = run(transformer, interval=(SIGMAS[0].item(), 1.0))
    assert seen == [L + R, L, L, L + R, L + R]
    assert (video - run(transformer)[0]).abs().max() > 1e-3
    plain, seen = run(transformer, interval=(1.5, 2.0))  # no step lies there
    assert seen == [L + R] * 3
    assert torch.equal(plain, run(transformer, text_scale=1.0, ref_scale=1.0)[0])
    off, _ = run(transformer, interval=(1.5, 2.0), ref_scale=0.0)  # a reference at 0 stays out
    assert torch.equal(off, run(transformer, text_scale=1.0, ref_scale=0.0)[0])


def test_between_fresh_steps_one_stream_is_run_and_the_deltas_are_made_anew_after(transformer):
    video, seen = run(transformer, every=2)
    assert seen == [L + R, L, L, L + R, L + R, L, L]
    assert (video - run(transformer)[0]).abs().max() > 1e-4


def test_every_step_can_be_looked_at(transformer):
    noise, context, null, tokens = inputs()
    steps = list(denoise_steps(transformer, noise, SIGMAS, context, null, tokens, LAYOUT,
                               Guidance()))
    x, x0 = steps[-1]
    assert len(steps) == 3 and (x - x0).abs().max() < 1e-5, "at noise 0 the tokens are the estimate"
    assert not steps[0][0].requires_grad
