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

import torch


def seeded(*numbers: int | str, device: str = "cpu") -> torch.Generator:
    """A generator that depends on all `numbers`, hashed: neighbours have nothing in common."""
    seed = random.Random(repr(numbers)).getrandbits(63)
    return torch.Generator(device=device).manual_seed(seed)
