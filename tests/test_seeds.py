"""A generator made from numbers is the same in every process, and different for other numbers.

Hardware: CPU, a blink. Run: python -m pytest tests/test_seeds.py
"""

import torch

from common.seeds import seeded


def first(*numbers) -> float:
    return torch.rand((), generator=seeded(*numbers)).item()


def test_every_number_and_their_order_count():
    draws = [first(0, 1), first(1, 0), first(0, 2), first(0), first(1), first(0, "order", 1)]
    assert len(set(draws)) == len(draws)


def test_the_numbers_of_yesterday_are_those_of_today():
    """What a run draws after a restart, in another process; hash() of a word would change."""
    assert abs(first(0, 7, 3) - 0.6597472) < 1e-6
    assert abs(first(4, "order", 0) - 0.9946463) < 1e-6
