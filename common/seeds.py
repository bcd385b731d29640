"""Random numbers that depend on where they are used, not on what was drawn before.

The idea. A training that draws everything from one generator can go on after a kill only if the
generator's state was saved, and another number of processes draws other numbers. Here every place
that needs chance makes a generator of its own from what names the place: (seed, step, clip). So
"where we are" is one number, a step can be prepared ahead, by any process, and what one clip draws
does not depend on its neighbours.

ST-DRC (arXiv 2606.02441) says nothing of this; our reading: all of it.

Conventions. Numbers or short strings, whose order counts; the same ones draw the same.

    noise = torch.randn(8, generator=seeded(args.seed, step, place))

Read next: ltx/checkpoint.py
"""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

Generators = Generator | Sequence[Generator]  # of a whole batch, or one for each of its clips


def seeded(*numbers: int | str, device: str = "cpu") -> torch.Generator:
    """A generator that depends on all `numbers`, hashed: neighbours have nothing in common."""
    seed = random.Random(repr(numbers)).getrandbits(63)
    return torch.Generator(device=device).manual_seed(seed)


def drawn(generators: Generators, count: int, draw: Callable[..., tuple[Tensor, ...]]
          ) -> tuple[Tensor, ...]:
    """What is random about `count` clips: draw(generator, clips) -> tensors with a row per clip.

    clips: a slice. One generator for each clip makes it the same clip in whatever batch it comes,
    and costs a call each; a single one draws all at once, as a GPU needs it.
    """
    if isinstance(generators, Generator):
        return draw(generators, slice(0, count))
    each = [draw(g, slice(k, k + 1)) for k, g in enumerate(generators)]
    return tuple(torch.cat(part) for part in zip(*each, strict=True))
