"""Three-stream guidance: one dial for the prompt, another for the face.

A model that has learnt to work with and without its conditions can be pushed along the arrow "what did this condition
change?". Ordinary classifier-free guidance has one arrow, from "no condition" to "all conditions". With a prompt AND a
face that single dial cannot say "keep the face, follow the prompt more": the face fades when the dial is low, and the
skin burns out when it is high. So we draw two arrows, each with its own length.

    v_0   neither prompt nor reference        v_T   prompt only
    v_R   reference only                      v_RT  both; this is the plain conditional prediction

paper:        three model streams at inference, text adherence and reference fidelity controlled separately
              (ST-DRC, arXiv 2606.02441, abstract: decoupled text/reference guidance). No formula, no scales.
our reading:  which three of the four streams, and how they are summed. Three orders are here, `text_first` is the
              default: its reference arrow is "with minus without the reference tokens", two of its three streams are
              the untouched base model, and training needs to drop the reference only. Published reference-to-video
              systems mostly use `reference_first`. None of them is claimed to be the paper's.

Conventions. A scale of 1 switches guidance along its arrow OFF (the plain prediction); 0 removes the condition. At
(1, 1) every order is v_RT alone. The weights of the streams sum to one, so velocities and clean estimates give the
same result (x0 = x_s - sigma * v turns one into the other); only `rescale` tells them apart, LTX-2.3 uses the clean
estimate. "No reference" means the tokens are taken out of the sequence, not zeroed; "no text" means an empty or
negative prompt that went through the text encoder.

    predict = lambda text, ref: clean_estimate_of(model, prompt if text else null, face if ref else None)
    x0 = guide(predict, text_scale=3.0, ref_scale=2.0)          # three calls of the model
    x0 = guide(predict, text_scale=1.0, ref_scale=1.0)          # one call

Read next: sample.py, which calls this once per denoising step.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# A stream is named by what the model may see: (text, reference).
NULL, TEXT, REF, BOTH = (False, False), (True, False), (False, True), (True, True)

ORDERS = ("text_first", "reference_first", "two_deltas")


def stream_weights(text_scale: float, ref_scale: float, order: str = "text_first") -> dict[tuple[bool, bool], float]:
    """How much of each stream goes into the guided prediction; the keys are (text, reference).

    paper: three streams, separate control of text and reference. our reading: the three sums below, with s_T =
    `text_scale` and s_R = `ref_scale` (1 = guidance off, 0 = condition removed):

        text_first        v_0  + s_T (v_T - v_0)        + s_R (v_RT - v_T)
        reference_first   v_0  + s_R (v_R - v_0)        + s_T (v_RT - v_R)
        two_deltas        v_RT + (s_T - 1)(v_RT - v_R)  + (s_R - 1)(v_RT - v_T)

    The weights sum to one. Streams of weight zero are left out, so that nobody pays for them. The most conditioned
    stream comes first. Raises ValueError on an unknown order or a scale that is not a finite number.
    """
    if not (math.isfinite(text_scale) and math.isfinite(ref_scale)):
        raise ValueError(f"expected finite guidance scales, got text {text_scale}, reference {ref_scale}; try 3 and 2")
    # Each sum above, with its brackets multiplied out and sorted by stream.
    if order == "text_first":
        weights = {BOTH: ref_scale, TEXT: text_scale - ref_scale, NULL: 1 - text_scale}
    elif order == "reference_first":
        weights = {BOTH: text_scale, REF: ref_scale - text_scale, NULL: 1 - ref_scale}
    elif order == "two_deltas":
        weights = {BOTH: text_scale + ref_scale - 1, TEXT: 1 - ref_scale, REF: 1 - text_scale}
    else:
        raise ValueError(f"expected an order out of {', '.join(ORDERS)}, got {order!r}; use one of these")
    return {stream: float(weight) for stream, weight in weights.items() if weight != 0}


def guide(
    predict: Callable[[bool, bool], Tensor],
    text_scale: float = 3.0,
    ref_scale: float = 2.0,
    order: str = "text_first",
    rescale: float = 0.0,
    stg_scale: float = 0.0,
    perturb: Callable[[bool, bool], Tensor] | None = None,
) -> Tensor:
    """Run the streams that carry weight, one by one, and add them up.

    paper: reference classifier-free guidance with three streams. our reading: the sums of `stream_weights`; s_T = 3 is
    LTX-2.3's own text guidance, s_R = 2 the low end of what public nodes suggest.

    predict(text, ref) returns the velocity or the clean estimate of the video tokens (B, L, C), in float32: the sum
    magnifies differences between streams, and bfloat16 has only three digits to take them from (LTX-2.3: guidance is
    computed in float32). Returns a tensor of that shape. When one stream carries all the weight, its prediction is
    returned itself, bit for bit, after one call.

    rescale in [0, 1], 0 = off. LTX-2.3: long arrows widen the spread of the values (haloes, burnt skin); multiply by
    rescale * std(conditional) / std(guided) + 1 - rescale to bring it back, 0.7 in the official settings. The result is
    then no longer linear in the scales.

    stg_scale, 0 = off. LTX-2.3: a further arrow, away from what the same stream predicts when the self-attention of
    some blocks is switched off: perturb(text, ref), one more call. our reading: it starts at the most conditioned
    stream, as LTX-2.3's own starts at the conditional one. Raises ValueError for a rescale outside [0, 1], a missing
    perturb, and as `stream_weights` does.
    """
    if not 0 <= rescale <= 1:
        raise ValueError(f"expected rescale between 0 and 1, got {rescale}; use 0 for off, 0.7 for the LTX-2.3 setting")
    if stg_scale != 0 and perturb is None:
        raise ValueError(f"expected perturb for an stg_scale of {stg_scale}, got None; pass it or set the scale to 0")
    weights = stream_weights(text_scale, ref_scale, order)
    if list(weights.values()) == [1.0] and stg_scale == 0:
        (stream,) = weights
        return predict(*stream)

    # One by one, not as one batch of three: the streams differ in length (no reference tokens in v_0 and v_T), and
    # few cards have the memory for three passes of a model this size at once.
    conditional, guided = None, 0.0
    for stream, weight in weights.items():
        prediction = predict(*stream)                                     # (B, L, C)
        if conditional is None:
            conditional = prediction  # v_RT, or v_T where the reference is off: then this is the base model's own CFG
        guided = guided + weight * prediction
    if stg_scale != 0:
        guided = guided + stg_scale * (conditional - perturb(*next(iter(weights))))

    if rescale > 0:
        # LTX-2.3: the spread is taken over the whole tensor, tokens and batch together.
        guided = guided * (rescale * conditional.std() / guided.std() + 1 - rescale)
    return guided


def _demo() -> None:
    # Four predictions as arrows in the plane: the prompt pulls to the right, the face pulls upwards, and together
    # they do slightly more than the sum of both. That last bit is what the orders disagree about.
    streams = {NULL: (0.0, 0.0), TEXT: (1.0, 0.1), REF: (0.2, 1.0), BOTH: (1.3, 1.2)}
    names = {NULL: "v_0", TEXT: "v_T", REF: "v_R", BOTH: "v_RT"}
    calls = []

    def predict(text, ref):
        calls.append(names[text, ref])
        return torch.tensor(streams[text, ref])

    def arrow(vector):
        return f"({vector[0]:+.2f}, {vector[1]:+.2f})"

    for stream, vector in streams.items():
        print(f"{names[stream]:5s} = {arrow(vector)}")

    print("\nthe arrow sum of text_first at (s_T, s_R) = (3, 2), tip to tail:")
    v0, vt, vrt = (torch.tensor(streams[s]) for s in (NULL, TEXT, BOTH))
    print(f"  start at v_0              {arrow(v0)}")
    print(f"  + 3 (v_T  - v_0)          {arrow(3 * (vt - v0))}     the prompt, three times as long")
    print(f"  + 2 (v_RT - v_T)          {arrow(2 * (vrt - vt))}     the face, twice as long")
    print(f"  = guide(predict, 3, 2)    {arrow(guide(predict, 3.0, 2.0))}")

    print(f"\n{'order':17s} {'s_T':>4s} {'s_R':>4s}   {'result':16s} weights of the streams that were run")
    for order in ORDERS:
        for scales in ((3.0, 2.0), (1.0, 1.0), (2.0, 2.0), (3.0, 0.0), (0.0, 0.0)):
            calls.clear()
            result = guide(predict, *scales, order=order)
            weights = stream_weights(*scales, order=order)
            terms = "  ".join(f"{weights[s]:+.0f} {names[s]}" for s in weights)
            assert calls == [names[s] for s in weights]
            print(f"{order:17s} {scales[0]:4.1f} {scales[1]:4.1f}   {arrow(result):16s} {terms}")
        print()
    print("At (3, 0) text_first is the base model's own text guidance, with no reference token in sight.")
    print("Notice: (1, 1) is v_RT and costs one stream in every order; (0, 0) is v_0, except in two_deltas.")


if __name__ == "__main__":
    _demo()
