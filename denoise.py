"""The sampling loop: noise in, latent video out; at every step the streams of guidance see the reference or do not.

The idea. Here the paper's inference happens: the reference's tokens are appended, clean, to the noisy video tokens at
their TASS positions (rope.py, reference.py), the streams are combined (guidance.py), one Euler step follows, and the
reference's outputs are dropped. Two mistakes that look harmless: a reference that is denoised along drifts away from
the face; and a "stream without reference" made of zeros still sees a picture, a grey one. So the reference is appended
anew in every call, and taken out of the sequence where it must not be seen.

paper:       reference tokens beside the video tokens; three streams; the reference is never decoded (ST-DRC, arXiv
             2606.02441, abstract and figure).
LTX-2.3:     Euler steps on the clean estimate x0 = x - sigma * v, in float32.
our reading: `guide_range` and `guide_every`, which save calls. Three streams cost three calls of the model in every
             step, the paper says nothing of cheaper ones. Outside the range one stream is run, with every condition
             whose scale is not 0; between fresh steps the arrows between streams are kept (guidance.cached_deltas).

Conventions. Sigma 1 = noise, 0 = data. Scales: 1 = not amplified, 0 = see guidance.py; rescale and stg_scale 0 = off.
guide_range (0, 1) and guide_every 1 = every stream in every step.

Usage, with a loaded model (sample.generate):
    latent = denoise(transformer, context, null_context, reference_tokens, (F, H, W), 24.0, (8, 32), sigmas, noise)
    video = vae.decode(latent)                                                # (B, C, F, H, W) -> (B, 3, f, h, w)

Read next: sample.py
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from guidance import BOTH, NULL, REF, TEXT, cached_deltas, guide, stream_weights
from losses import clean_estimate
from model import euler_step
from reference import append_reference, drop_reference, unpatchify
from rope import grid_to_positions, reference_grid, source_phase, video_grid

# LTX-2.3: the official defaults; ref_scale is ours. A checkpoint's config["inference"] replaces any of them.
INFERENCE = {"width": 768, "height": 512, "num_frames": 121, "frame_rate": 24.0, "steps": 30, "text_scale": 3.0,
             "ref_scale": 2.0, "rescale": 0.0, "stg_scale": 0.0, "stg_blocks": [28], "guide_range": [0.0, 1.0],
             "guide_every": 1, "schedule_tokens": 4096, "reference_psnr_floor": None}
STREAM_NAMES = {NULL: "null", TEXT: "text", REF: "face", BOTH: "text+face"}


def guidance_steps(sigmas: Tensor, guide_range: tuple[float, float] = (0.0, 1.0), guide_every: int = 1) -> list[str]:
    """What each step runs: "all" streams, "kept" arrows and one fresh stream, or "one" stream without guidance.

    our reading. sigmas (steps + 1,): a step belongs to the range if the noise level it starts from does, both ends
    included. The first step in the range is fresh, then every guide_every-th. Raises ValueError for an empty range or
    guide_every below 1.
    """
    low, high = guide_range
    if not low <= high or guide_every < 1:
        raise ValueError(f"expected a guidance range from low to high sigma and every step or rarer, got {low} to {high} "
                         f"and every {guide_every}; use 0 1 and 1 for all steps")
    inside = (sigmas[:-1] >= low) & (sigmas[:-1] <= high)                                 # (steps,)
    counts = inside.cumsum(0).tolist()  # which step of the range this is, from 1
    return [("all" if (count - 1) % guide_every == 0 else "kept") if here else "one"
            for here, count in zip(inside.tolist(), counts, strict=True)]


def forwards(steps: list[str], streams: int) -> int:
    """Calls of the model for a whole run; steps of `guidance_steps`, streams that carry weight."""
    return sum(streams if step == "all" else 1 for step in steps)


@torch.no_grad()
def denoise(transformer: nn.Module, context: Tensor, null_context: Tensor, reference_tokens: Tensor | None,
            grid: tuple[int, int, int], frame_rate: float, scales: tuple[int, int], sigmas: Tensor, noise: Tensor,
            text_scale: float = 3.0, ref_scale: float = 2.0, order: str = "text_first", rescale: float = 0.0,
            placement: str = "tass", progress: bool = False, phase_scale: float = 1.0, stg_scale: float = 0.0,
            stg_blocks: Sequence[int] = (28,), guide_range: tuple[float, float] = (0.0, 1.0),
            guide_every: int = 1) -> Tensor:
    """Noise -> latent video (B, C, F, H, W), float32, for a whole batch at once.

    paper: three streams over video tokens with and without the appended reference. LTX-2.3: Euler steps on x0.
    context, null_context (B, N, D) or (1, N, D); reference_tokens (B, R, C) with R = H*W, or None for text only; grid
    (F, H, W) in latent cells; scales (time_scale, space_scale) of the VAE; sigmas (steps + 1,) falling to 0; noise
    (B, F*H*W, C). A stream without reference has no reference tokens at all; a stream of weight 0 is not run.
    stg_scale, 0 = off: LTX-2.3's perturbed stream, self-attention switched off in stg_blocks; one more call per step.
    guide_range (low, high sigma) and guide_every: see `guidance_steps`; (0, 1) and 1 = off.
    A sample does not depend on its neighbours in the batch unless rescale > 0 (LTX-2.3: one spread for the batch).
    Raises ValueError when an estimate is not finite, naming the step, and as `guidance_steps` does.
    """
    B, L, _ = noise.shape
    if reference_tokens is None:
        order, ref_scale = "text_first", 0.0  # what is left is ordinary text guidance
    video = grid_to_positions(video_grid(*grid), frame_rate, *scales).to(noise.device).expand(B, 3, L, 2)
    beside = grid_to_positions(reference_grid(*grid, placement), frame_rate, *scales)     # (3, R, 2)
    phase = source_phase(placement, L, beside.shape[1], phase_scale)                      # None for ST-DRC
    contexts = {True: context.expand(B, -1, -1), False: null_context.expand(B, -1, -1)}   # (B, N, D) each
    names = ", ".join(STREAM_NAMES[stream] for stream in stream_weights(text_scale, ref_scale, order))
    what, kept = guidance_steps(sigmas, guide_range, guide_every), {}

    x, steps = noise.to(torch.float32), len(sigmas) - 1
    for i in tqdm(range(steps), desc=f"denoise [{names}]", unit="step", disable=not progress):
        sigma = sigmas[i].to(noise.device).expand(B)                                      # (B,)

        def predict(text: bool, ref: bool, skip: Sequence[int] = (), x: Tensor = x, sigma: Tensor = sigma) -> Tensor:
            tokens, timesteps, positions, turn = x, sigma[:, None].expand(B, L), video, None
            if ref:
                tokens, timesteps, positions = append_reference(tokens, timesteps, positions, reference_tokens, beside)
                turn = phase
            velocity = transformer(tokens, timesteps, sigma, positions, contexts[text], skip_blocks=skip, phase=turn)
            return clean_estimate(x, drop_reference(velocity, L), sigma)                  # (B, L, C) float32

        def perturb(text: bool, ref: bool, predict: Callable[..., Tensor] = predict) -> Tensor:
            return predict(text, ref, stg_blocks)

        if what[i] == "one":  # the conditions stay, only their amplification goes
            x0 = predict(text_scale != 0, ref_scale != 0)                                 # (B, L, C)
        else:
            run = predict if guide_every == 1 else cached_deltas(predict, kept, fresh=what[i] == "all")
            x0 = guide(run, text_scale, ref_scale, order, rescale, stg_scale, perturb)    # (B, L, C)
        if not x0.isfinite().all():
            raise ValueError(f"expected finite latents, got NaN or infinity at step {i + 1} of {steps}; "
                             "use --dtype float32 or lower the scales")
        x = euler_step(x, x0, sigmas[i], sigmas[i + 1])
    return unpatchify(x, *grid)
