"""Which examples does each step of training see, and how many steps does one call run?"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Full batches in an epoch. Raises ValueError if there is none."""
    if examples < batch_size:
        raise ValueError(f"{examples} training images do not fill a batch of {batch_size}.")
    return examples // batch_size


def epoch_order(
    examples: int, batch_size: int, seed: int, epoch: int
) -> Int[np.ndarray, "steps batch"]:
    """The shuffle of one epoch, cut into full batches. It depends on the seed and the epoch alone.

    >>> epoch_order(5, 2, seed=0, epoch=1).shape
    (2, 2)
    """
    steps = steps_per_epoch(examples, batch_size)
    order = np.random.RandomState([seed, epoch]).permutation(examples).astype(np.int32)
    return order[: steps * batch_size].reshape(steps, batch_size)


def segments(start: int, steps: int, every: int, scan: bool) -> Iterator[tuple[int, int]]:
    """Cuts the steps from `start` on into what one call runs: one step, or up to a refresh.

    >>> list(segments(10, 5, 4, True)), list(segments(10, 5, 0, True))
    ([(10, 12), (12, 15)], [(10, 15)])
    """
    stop = start + steps
    while start < stop:
        length = 1 if not scan else every - start % every if every else steps
        yield start, min(start + length, stop)
        start += length
