# SPDX-License-Identifier: MIT
# From "ST-DRC, line by line", an independent implementation of arXiv 2606.02441.
"""Three-stream guidance: one scale for the prompt, another for the face.

A model that has learnt to work with and without its conditions can be pushed along the difference
"what did this condition change?". Ordinary classifier-free guidance has one such delta, from "no
condition" to "all conditions". With a prompt AND a face its single scale cannot say "keep the face,
follow the prompt more": the face fades when it is low, and the skin burns out when it is high. So
there are two deltas, each with a scale of its own.

    v_0   neither prompt nor reference        v_T   prompt only
    v_R   reference only                      v_RT  both: the plain conditional prediction

Three of the four are run, and summed in one of three orders (`guided_sum`):

    text_first        v_0  + s_T (v_T - v_0)        + s_R (v_RT - v_T)
    reference_first   v_0  + s_R (v_R - v_0)        + s_T (v_RT - v_R)
    two_deltas        v_RT + (s_T - 1) (v_RT - v_R) + (s_R - 1) (v_RT - v_T)

paper:       three model streams at inference, text adherence and reference fidelity controlled
             separately (ST-DRC, arXiv 2606.02441, abstract). No formula, no scales.
our reading: which three, and the sums; none is claimed to be the paper's. Default `text_first`: its
             reference delta is "with minus without the reference tokens", and two of its streams
             never see a reference token, as the base model never did. Neighbours: InstructPix2Pix,
             Phantom and Lynx sum as `reference_first`. What is published for LTX keeps the
             reference beside the negative prompt and sums as `two_deltas`: ID-LoRA (arXiv
             2603.10256, LTX-2 and 2.3; its reference is a voice) and ComfyUI-BFSNodes
             (ltx_identity_overlap.py, a face). None uses our default, so it holds for weights that
             were trained here; sample.py asks a LoRA that says nothing of itself by `two_deltas`.

Conventions. A scale of 1 is off: the condition is there, its delta not amplified; at (1, 1) every
order is v_RT. 0 removes the reference (s_R in `text_first`) or the prompt (s_T in
`reference_first`). Weights of the streams sum to one, so velocities and clean estimates give the
same result; only `rescale` tells them apart, LTX-2.3 uses the clean estimate. "No reference" means
that the tokens are absent, not zero; "no text" an empty or negative prompt that was encoded.

Usage:
    import torch
    from guidance import Guidance, guide
    predict = lambda text, ref: torch.full((1, 6, 4), 1.0 * text + 2.0 * ref)     # the model
    v = guide(predict, Guidance(text_scale=3.0, ref_scale=2.0))     # (1, 6, 4), three calls
    v = guide(predict, Guidance(text_scale=1.0, ref_scale=1.0))     # one call

Read next: model.py
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# A stream is named by what the model may see: (text, reference).
NULL, TEXT, REF, BOTH = (False, False), (True, False), (False, True), (True, True)
ORDERS = ("text_first", "reference_first", "two_deltas")


@dataclass(frozen=True)
class Guidance:
    """How a run is guided; ValueError for what cannot be meant.

    paper: two scales. our reading: their defaults (3 is LTX-2.3's own for text, 2 the low end of
    public suggestions), `interval` and `every`, which save calls. LTX-2.3: rescale and stg.
    """

    text_scale: float = 3.0                       # s_T, 1 = off
    ref_scale: float = 2.0                        # s_R, 1 = off
    order: str = "text_first"
    rescale: float = 0.0                          # 0 = off, LTX-2.3's own setting is 0.7
    stg_scale: float = 0.0                        # 0 = off, LTX-2.3's own setting is 1
    stg_blocks: tuple[int, ...] = (28,)           # whose self-attention is switched off for it
    interval: tuple[float, float] = (0.0, 1.0)    # the noise levels that are guided; all = off
    every: int = 1                                # of these steps every so many runs all streams

    def __post_init__(self):
        if not all(map(math.isfinite, (self.text_scale, self.ref_scale, self.stg_scale))):
            raise ValueError(f"expected finite guidance scales, got text {self.text_scale}, "
                             f"reference {self.ref_scale}, stg {self.stg_scale}; try 3, 2 and 0")
        if self.order not in ORDERS:
            raise ValueError(f"expected an order out of {', '.join(ORDERS)}, got {self.order!r}; "
                             "use one of these")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"expected rescale between 0 and 1, got {self.rescale}; use 0 for off")
        low, high = self.interval
        if not low <= high or self.every < 1:
            raise ValueError("expected a guidance range from low to high sigma and every step or "
                             f"rarer, got {low} to {high} and every {self.every}; use 0 1 and 1")


def guided_sum(order: str, s_T: float, s_R: float, v_0: Any, v_T: Any, v_R: Any, v_RT: Any) -> Any:
    """our reading: the three sums, for whatever can be added and multiplied. v_*: of one shape."""
    if order == "text_first":
        return v_0 + s_T * (v_T - v_0) + s_R * (v_RT - v_T)
    if order == "reference_first":
        return v_0 + s_R * (v_R - v_0) + s_T * (v_RT - v_R)
    return v_RT + (s_T - 1) * (v_RT - v_R) + (s_R - 1) * (v_RT - v_T)  # two_deltas


def stream_weights(guidance: Guidance) -> dict[tuple[bool, bool], float]:
    """How much of each stream goes into the sum; the keys are (text, reference).

    our reading: the sum is linear, so it is asked what it makes of one stream = 1, the others = 0.
    The weights sum to one. Streams of weight zero are left out, so that nobody pays for them. The
    most conditioned stream comes first.
    """
    weights = {}
    for stream in (BOTH, TEXT, REF, NULL):
        one_hot = (float(stream == other) for other in (NULL, TEXT, REF, BOTH))
        weight = guided_sum(guidance.order, guidance.text_scale, guidance.ref_scale, *one_hot)
        if weight != 0:
            weights[stream] = weight
    return weights


def guide(predict: Callable[..., Tensor], guidance: Guidance, deltas: dict | None = None) -> Tensor:
    """Run the streams that carry weight, one by one, and add them up.

    paper: reference classifier-free guidance with three streams. our reading: `guided_sum`.

    predict(text, ref) returns the velocity or the clean estimate of the video tokens (B, L, C) in
    float32: the sum magnifies differences between streams, and bfloat16 has only three digits to
    take them from. Returns that shape; where one stream carries all the weight, its prediction
    itself, bit for bit, after one call.

    stg_scale: LTX-2.3: one more delta, away from what the same stream predicts with the
    self-attention of stg_blocks switched off: predict(text, ref, skip_blocks=stg_blocks). our
    reading: it starts at the most conditioned stream. rescale: LTX-2.3: long deltas widen the
    spread of values (haloes, burnt skin); brought back by rescale * std(conditional) / std(guided)
    + 1 - rescale. The result is then no longer linear in the scales.

    deltas: our reading: what a condition changes varies less from step to step than the picture
    does. A dict that holds deltas from the first stream to the others: those are used instead of
    running the others. An empty dict is filled. None = off.
    """
    weights = stream_weights(guidance)
    first, *others = weights                                              # v_RT, or v_T without ref
    # One by one, not as a batch of three: the streams differ in length (no reference tokens in v_0
    # and v_T), and few cards have the memory for three passes of a model this size at once.
    conditional = predict(*first)                                         # (B, L, C)
    if not others and guidance.stg_scale == 0:
        return conditional
    guided = 0.0 + weights[first] * conditional
    fresh = not deltas
    for stream in others:
        if deltas is None:
            prediction = predict(*stream)                                 # (B, L, C)
        else:
            if fresh:
                deltas[stream] = predict(*stream) - conditional           # (B, L, C)
            prediction = conditional + deltas[stream]
        guided = guided + weights[stream] * prediction
    if guidance.stg_scale != 0:
        perturbed = predict(*first, skip_blocks=guidance.stg_blocks)      # (B, L, C)
        guided = guided + guidance.stg_scale * (conditional - perturbed)
    if guidance.rescale > 0:
        # LTX-2.3: the spread is taken over the whole tensor, tokens and batch together.
        ratio = conditional.std() / guided.std()
        guided = guided * (guidance.rescale * ratio + 1 - guidance.rescale)
    return guided


def guidance_steps(sigmas: Tensor, guidance: Guidance) -> list[str]:
    """our reading: what each step runs: "all" streams, "cached" deltas, or "one" stream unguided.

    sigmas (steps + 1,): a step belongs to the interval if the noise level it starts from does,
    both ends included. The first step in it runs all streams, then every `every`-th; those between
    run one fresh stream and keep the deltas. Outside, the conditions stay, unamplified.
    """
    low, high = guidance.interval
    steps, inside = [], 0
    for sigma in sigmas[:-1].tolist():
        if not low <= sigma <= high:
            steps.append("one")
        else:
            steps.append("all" if inside % guidance.every == 0 else "cached")
            inside += 1
    return steps


# The demo's four predictions, as points: the prompt pulls to the right, the face upwards, and both
# together do more than the sum of what each does alone. That is what the orders disagree about.
EXAMPLE = {NULL: (0.0, 0.0), TEXT: (1.0, 0.1), REF: (-0.3, 1.5), BOTH: (1.3, 1.7)}
NAMES = {NULL: "v_0", TEXT: "v_T", REF: "v_R", BOTH: "v_RT"}


def _demo() -> None:
    print("predictions:  " + "  ".join(f"{NAMES[s]} = {point}" for s, point in EXAMPLE.items()))
    print(f"{'order':17s}(s_T, s_R)   guide gives      weights of the streams that are run")
    for order in ORDERS:
        for scales in ((1.0, 1.0), (3.0, 2.0), (2.0, 2.0), (3.0, 0.0)):
            g = Guidance(*scales, order)
            x, y = guide(lambda text, ref: torch.tensor(EXAMPLE[text, ref]), g).tolist()
            terms = (f"{weight:+.0f} {NAMES[s]}" for s, weight in stream_weights(g).items())
            print(f"{order:17s}{scales}   ({x:+.2f}, {y:+.2f})  ", *terms)
    print("At (3, 0) text_first is the base model's own text guidance, without the reference.")
    print("Notice: all orders agree at (1, 1), for one call; text_first and reference_first agree")
    print("at equal scales, where the middle stream cancels. Elsewhere they part.")


if __name__ == "__main__":
    _demo()
