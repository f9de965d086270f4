"""Global generators: given back as they were, and lent to one thread at a time."""

from __future__ import annotations

import contextlib
import random
import threading
import time

import numpy as np
import torch

from hybridpar.generators import all_borrowed, borrowed, seed_all


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.random()), random.random()  # noqa: S311 - no secret


def test_all_generators_are_given_back_as_they_were() -> None:
    seed_all(2**62 + 3)
    expected = draw()
    seed_all(2**62 + 3)
    with contextlib.suppress(ValueError), all_borrowed():
        seed_all(1)
        draw()
        raise ValueError
    assert draw() == expected


def test_a_seed_decides_what_is_drawn_and_none_draws_on() -> None:
    torch.default_generator.manual_seed(5)
    before = torch.get_rng_state()
    with borrowed(9):
        first = torch.rand(3)
    with borrowed(9), borrowed():  # the borrower may lend on
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_threads_do_not_shift_each_others_numbers() -> None:
    """Ranks that were threads once started with different weights, when one read samples as another was made."""
    drawn: dict[int, list[float]] = {}

    def borrower(number: int) -> None:
        with all_borrowed() if number % 2 else borrowed():
            seed_all(number)
            drawn[number] = []
            for _ in range(5):
                drawn[number].append(torch.rand(()).item())
                time.sleep(0.001)

    threads = [threading.Thread(target=borrower, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, values in drawn.items():
        generator = torch.Generator().manual_seed(number)
        assert values == [torch.rand((), generator=generator).item() for _ in range(5)]
