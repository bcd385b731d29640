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
              default: its reference arrow is "with minus without the reference tokens", two of its three streams
              never see a reference token, as the base model never did, so training must above all drop the reference.
              Published reference-to-video systems mostly use `reference_first`. None of them is claimed to be the
              paper's.

Conventions. A scale of 1 switches guidance along its arrow OFF. 0 drops the arrow; the reference is really out of the
sum only at s_R = 0 in `text_first`, the prompt only at s_T = 0 in `reference_first`. At (1, 1) every order is v_RT.
The weights of the streams sum to one, so velocities and clean estimates give the same result (x0 = x_s - sigma * v
turns one into the other); only `rescale` tells them apart, LTX-2.3 uses the clean estimate. "No reference" means the
tokens are taken out of the sequence, not zeroed; "no text" means an empty or negative prompt that went through the
text encoder.

Usage:
    import torch
    from guidance import guide
    predict = lambda text, ref: torch.full((1, 6, 4), 1.0 * text + 2.0 * ref)       # the model; returns (B, L, C)
    v = guide(predict, text_scale=3.0, ref_scale=2.0)           # three calls of the model
    v = guide(predict, text_scale=1.0, ref_scale=1.0)           # one call

Read next: denoise.py
"""

import math
from collections.abc import Callable, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# A stream is named by what the model may see: (text, reference).
NULL, TEXT, REF, BOTH = (False, False), (True, False), (False, True), (True, True)

ORDERS = ("text_first", "reference_first", "two_deltas")


def stream_weights(text_scale: float, ref_scale: float, order: str = "text_first") -> dict[tuple[bool, bool], float]:
    """How much of each stream goes into the guided prediction; the keys are (text, reference).

    paper: three streams, separate control of text and reference. our reading: the three sums below, with s_T =
    `text_scale` and s_R = `ref_scale` (1 = guidance off, 0 = no arrow):

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


def cached_deltas(predict: Callable[[bool, bool], Tensor], kept: dict, fresh: bool) -> Callable[[bool, bool], Tensor]:
    """A `predict` for `guide` that saves calls: only the first stream asked for is run, others follow it at a distance.

    our reading: the paper knows nothing of it. What a condition changes varies less from step to step than the picture
    does. So the arrows from the first (most conditioned) stream to the others are stored in `kept` when `fresh`, and
    laid onto the new first stream when not. `kept` is one dict for a whole run, its first step fresh. fresh in every
    step = off. predict and the result are as in `guide`.
    """
    anchor = []

    def run(text: bool, ref: bool) -> Tensor:
        if not anchor:
            anchor.append(predict(text, ref))                             # (B, L, C)
            return anchor[0]
        if fresh:
            kept[text, ref] = predict(text, ref) - anchor[0]              # (B, L, C)
        return anchor[0] + kept[text, ref]

    return run


# The demo's four predictions, as points: the prompt pulls to the right, the face upwards, and both together do more
# than the sum of what each does alone. That last bit is what the orders disagree about.
EXAMPLE = {NULL: (0.0, 0.0), TEXT: (1.0, 0.1), REF: (-0.3, 1.5), BOTH: (1.3, 1.7)}
NAMES = {NULL: "v_0", TEXT: "v_T", REF: "v_R", BOTH: "v_RT"}
COLORS = ((0, 114, 178), (213, 94, 0))  # of the text dial, of the reference dial


def draw(scales: Sequence[tuple[float, float]] = ((1, 1), (3, 1), (1, 2), (3, 2))) -> Image.Image:
    """our reading: (picture) a panel per order: the deltas of `EXAMPLE` tip to tail, a black dot where `guide` ends.

    scales: pairs (s_T, s_R), one path each, the last one bold and written out. Returns (1590, 450) RGB; the point
    (x, y) of panel k = 0, 1, 2 is at pixel (530 k + 72 + 78 x, 420 - 78 y).
    """
    picture = Image.new("RGB", (3180, 900), "white")  # twice the size, halved at the end: smooth lines
    pen = ImageDraw.Draw(picture)

    def write(x, y, words, color="black", size=32, anchor="lm"):
        pen.text((x, y), words, color, ImageFont.load_default(size), anchor, stroke_width=5, stroke_fill="white")
        return x + pen.textlength(words, ImageFont.load_default(size))

    # Where the path of each order starts, the scales at that point, and its arrows: which dial, from where to where.
    paths = {
        "text_first": (NULL, 0, ((0, NULL, TEXT), (1, TEXT, BOTH))),
        "reference_first": (NULL, 0, ((1, NULL, REF), (0, REF, BOTH))),
        "two_deltas": (BOTH, 1, ((0, REF, BOTH), (1, TEXT, BOTH))),
    }
    for left, (order, (start, off, steps)) in zip((0, 1060, 2120), paths.items(), strict=True):
        # In pixels from here on. Guidance does not mind where zero is, for its weights sum to one.
        v = {s: torch.tensor([left + 144 + 156 * x, 840 - 156 * y]) for s, (x, y) in EXAMPLE.items()}
        dots = [(v[s].tolist(), 8, "dimgray", NAMES[s], -18, -24, "rm") for s in v]
        write(left + 40, 50, order, size=44)
        end = write(left + 40, 120, f"{scales[-1]}:  {NAMES[start]}")
        for pair in scales:
            tip, width = v[start], 10 if pair == scales[-1] else 4
            for dial, a, b in steps:
                tail, tip = tip, tip + (pair[dial] - off) * (v[b] - v[a])
                head = (tip - tail) * (8 + 2 * width) / max((tip - tail).norm().item(), 1)
                side = 0.4 * head.flip(0) * torch.tensor([-1, 1])
                pen.line(torch.cat([tail, tip - head]).tolist(), COLORS[dial], width)
                pen.polygon(torch.cat([tip, tip - head - side, tip - head + side]).tolist(), COLORS[dial])
                if pair == scales[-1]:
                    end = write(end, 120, f"  + {pair[dial] - off:g} ({NAMES[b]} - {NAMES[a]})", COLORS[dial])
            end_point = guide(lambda text, ref, v=v: v[text, ref], *pair, order=order).tolist()
            dots.insert(0, (end_point, 12, "black", str(pair), 20, 28, "lm"))
        for (x, y), radius, color, name, right, down, anchor in dots:
            pen.ellipse([x - radius, y - radius, x + radius, y + radius], color)
            write(x + right, y + down, name, color, 32, anchor)
    return picture.reduce(2)


def _demo() -> None:
    print("four predictions:  " + "  ".join(f"{NAMES[s]} = {point}" for s, point in EXAMPLE.items()))
    print(f"{'order':17s}(s_T, s_R)   guide gives      weights of the streams that are run")
    for order in ORDERS:
        for scales in ((1.0, 1.0), (3.0, 2.0), (2.0, 2.0), (3.0, 0.0), (0.0, 0.0)):
            x, y = guide(lambda text, ref: torch.tensor(EXAMPLE[text, ref]), *scales, order=order).tolist()
            terms = (f"{weight:+.0f} {NAMES[s]}" for s, weight in stream_weights(*scales, order=order).items())
            print(f"{order:17s}{scales}   ({x:+.2f}, {y:+.2f})   {'  '.join(terms)}")
    print("At (3, 0) text_first is the base model's own text guidance, with no reference token in sight.")
    draw().save("guidance_demo.png")
    print("wrote guidance_demo.png: a panel per order; arrows: prompt blue, reference orange; black: guide(s_T, s_R)")
    print("Notice: all orders agree at (1, 1), for one call, and the two chains at equal scales; elsewhere they part.")


if __name__ == "__main__":
    _demo()
