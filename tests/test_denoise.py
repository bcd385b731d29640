"""denoise.py: the loop written out by hand, what a stream sees, what is left out to save calls.

The weights are random. Hardware: CPU, a few seconds. Run: python -m pytest tests/test_denoise.py
"""

import pytest
import torch
from tiny import SIZES, livelier

from denoise import denoise, forwards, guidance_steps
from guidance import ORDERS, cached_deltas, guide
from model import VideoTransformer, ltx_sigmas
from rope import grid_to_positions, reference_grid, video_grid

GRID, RATE, SCALES = (2, 3, 2), 8.0, (4, 8)
L, R, C = 12, 6, SIZES.in_channels


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(1)
    return livelier(VideoTransformer(SIZES)).eval()


def run(transformer, batch: int = 1, seed: int = 3, reference=True, **options):
    g = torch.Generator().manual_seed(seed)
    noise, tokens = torch.randn(batch, L, C, generator=g), torch.randn(batch, R, C, generator=g)
    context, null = (torch.randn(batch, 8, SIZES.dim, generator=g) for _ in range(2))
    pick = options.pop("pick", slice(None))
    reference = {True: tokens, None: None}.get(reference, reference) if not torch.is_tensor(reference) else reference
    reference = reference if reference is None else reference[pick]
    return denoise(transformer, context[pick], null[pick], reference, GRID, RATE, SCALES,
                          ltx_sigmas(3, 48), noise[pick], **options)  # fmt: skip


def test_without_reference_scale_the_reference_is_ignored_bit_for_bit(transformer):
    plain = run(transformer, ref_scale=0.0)
    assert plain.shape == (1, C, *GRID) and plain.dtype == torch.float32
    assert torch.equal(plain, run(transformer, ref_scale=0.0, reference=torch.full((1, R, C), 9.0)))
    assert torch.equal(plain, run(transformer, reference=None, ref_scale=5.0, order="two_deltas"))
    assert (plain - run(transformer, ref_scale=2.0)).abs().max() > 1e-2


def test_a_batch_of_two_equals_two_singles(transformer):
    for order in ORDERS:
        both = run(transformer, batch=2, order=order)
        singles = torch.cat([run(transformer, batch=2, order=order, pick=slice(i, i + 1)) for i in range(2)])
        found = (both - singles).abs().max().item()
        assert found < 1e-4, f"{order}: {found}"  # other sums of the same numbers, rounded otherwise


def test_the_plain_loop_written_out_gives_the_same_video(transformer):
    """Two routes, one answer: three passes and one Euler step written out by hand."""
    found = run(transformer, text_scale=3.0, ref_scale=2.0)
    g = torch.Generator().manual_seed(3)
    x, tokens = torch.randn(1, L, C, generator=g), torch.randn(1, R, C, generator=g)
    context, null = (torch.randn(1, 8, SIZES.dim, generator=g) for _ in range(2))
    grid = torch.cat([video_grid(*GRID), reference_grid(*GRID)])
    positions = grid_to_positions(grid, RATE, *SCALES)[None]
    sigmas = ltx_sigmas(3, 48)
    with torch.no_grad():
        for s, s_next in zip(sigmas[:-1], sigmas[1:], strict=True):
            level = torch.full((1, L + R), s.item())
            level[:, L:] = 0  # the reference is clean at every step
            full = transformer(torch.cat([x, tokens], 1), level, s[None], positions, context)[:, :L]
            text, none = (transformer(x, level[:, :L], s[None], positions[:, :, :L], c) for c in (context, null))
            velocity = none + 3.0 * (text - none) + 2.0 * (full - text)
            x = x + (s_next - s) * velocity
    difference = (found - x.transpose(1, 2).reshape(1, C, *GRID)).abs().max().item()
    assert difference < 1e-4, difference


def test_plain_conditional_sampling_costs_one_pass_per_step(transformer):
    lengths = []
    handle = transformer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    run(transformer, text_scale=1.0, ref_scale=1.0)
    run(transformer, text_scale=3.0, ref_scale=2.0)
    handle.remove()
    assert lengths == [L + R] * 3 + [L + R, L, L] * 3


def test_a_number_that_is_not_finite_stops_the_run_and_names_the_step(transformer):
    broken = run(transformer, reference=torch.full((1, R, C), 1.0))
    assert broken.isfinite().all()
    with pytest.raises(ValueError, match="at step 1 of 3; use --dtype float32"):
        run(transformer, reference=torch.full((1, R, C), float("nan")))


# ------------------------------------------------------------ fewer calls


def lengths(transformer, **options):
    """The video, and how many tokens each call of the model was given."""
    seen = []
    handle = transformer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    video = run(transformer, **options)
    handle.remove()
    return video, seen


def test_a_step_belongs_to_the_range_by_the_level_it_starts_from():
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    assert guidance_steps(sigmas) == ["all"] * 4
    assert guidance_steps(sigmas, (0.5, 0.8)) == ["one", "all", "all", "one"]
    assert guidance_steps(sigmas, (0.0, 0.8), 2) == ["one", "all", "kept", "all"]
    assert guidance_steps(sigmas, guide_every=3) == ["all", "kept", "kept", "all"]
    assert forwards(["one", "all", "kept", "all"], 3) == 8
    for low, high, every in ((0.8, 0.2, 1), (0.0, 1.0, 0), (float("nan"), 1.0, 1)):
        with pytest.raises(ValueError, match="use 0 1 and 1 for all steps"):
            guidance_steps(sigmas, (low, high), every)


def test_outside_the_range_one_stream_with_all_conditions_is_run(transformer):
    first = float(ltx_sigmas(3, 48)[0])
    video, seen = lengths(transformer, guide_range=(first, 1.0))
    assert seen == [L + R, L, L, L + R, L + R]
    assert (video - run(transformer)).abs().max() > 1e-3
    plain, seen = lengths(transformer, guide_range=(1.5, 2.0))  # no step lies there
    assert seen == [L + R] * 3 and torch.equal(plain, run(transformer, text_scale=1.0, ref_scale=1.0))
    assert torch.equal(run(transformer, guide_range=(1.5, 2.0), ref_scale=0.0),
                       run(transformer, text_scale=1.0, ref_scale=0.0))  # a reference at 0 stays out
    assert torch.equal(run(transformer, guide_range=(1.5, 2.0), text_scale=0.0),
                       run(transformer, text_scale=0.0, ref_scale=1.0, order="reference_first"))  # and a prompt


def test_between_fresh_steps_one_stream_is_run(transformer):
    video, seen = lengths(transformer, guide_every=2)
    assert seen == [L + R, L, L, L + R, L + R, L, L]
    assert (video - run(transformer)).abs().max() > 1e-4
    for order in ORDERS:
        difference = (run(transformer, order=order, guide_every=1) - run(transformer, order=order)).abs().max().item()
        assert difference == 0, f"{order}: {difference}"


def test_kept_arrows_are_laid_onto_the_new_first_stream():
    """Streams that move together (a common shift from step to step) are guided exactly, whatever was kept."""
    arrows = {(True, True): torch.tensor([1.0, 1.0]), (True, False): torch.tensor([1.0, 0.0]),
              (False, False): torch.tensor([0.0, 0.5]), (False, True): torch.tensor([0.2, 0.7])}  # fmt: skip
    for order in ORDERS:
        kept = {}
        for step in range(3):
            calls, shift = [], step * torch.tensor([0.3, -0.2])

            def predict(text, ref, calls=calls, shift=shift):
                calls.append((text, ref))
                return arrows[text, ref] + shift

            cheap = guide(cached_deltas(predict, kept, fresh=step == 0), 3.0, 2.0, order)
            assert len(calls) == (3 if step == 0 else 1)
            difference = (cheap - guide(predict, 3.0, 2.0, order)).abs().max().item()
            assert difference < 1e-6, f"{order}, step {step}: {difference}"
