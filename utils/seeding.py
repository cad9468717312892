"""Draw random numbers from (seed, stream, index), never from global state or the order of work.

A stream is a sequence of integers and strings that names the purpose of the numbers, as in
`generator(seed, "episodes", epoch)`. Streams that differ anywhere are independent.
"""

import hashlib
import json
import operator
import random
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch


def _digest(seed: int, stream: Sequence[int | str]) -> int:
    # JSON distinguishes 1 from "1" and ("ab",) from ("a", "b"); hash() differs between processes.
    words = [word if isinstance(word, str) else operator.index(word) for word in (seed, *stream)]
    return int.from_bytes(hashlib.sha256(json.dumps(words).encode()).digest()[:16], "little")  # 128 bits


def generator(seed: int, *stream: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """Return the torch generator of (seed, *stream) on `device`.

    Raises TypeError for a stream item that is neither an integer nor a string.
    """
    return torch.Generator(device=device).manual_seed(_digest(seed, stream) & (2**63 - 1))


def numpy_generator(seed: int, *stream: int | str) -> np.random.Generator:
    """Return the NumPy generator of (seed, *stream). Errors as for `generator`."""
    return np.random.Generator(np.random.PCG64(_digest(seed, stream)))


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, for modules whose initial weights use them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def noise(shape_per_item: Sequence[int], indices: Iterable[int], seed: int, *stream: int | str) -> torch.Tensor:
    """Return standard normal noise. Each item depends only on (seed, *stream, its index).

    So an item is the same in any batch or order, and on any machine.

    Args:
        shape_per_item: shape of one item, such as (3, H, W).
        indices: N integers, one per item.
        seed, stream: as for `generator`.

    Returns:
        (N, *shape_per_item) float32 on the CPU.
    """
    return _per_item(lambda rng: rng.standard_normal(tuple(shape_per_item), np.float32), indices, seed, stream)


def uniform(shape_per_item: Sequence[int], indices: Iterable[int], seed: int, *stream: int | str) -> torch.Tensor:
    """Return uniform numbers in [0, 1). Each item depends only on (seed, *stream, its index).

    Arguments as for `noise`. Returns (N, *shape_per_item) float64 on the CPU.
    """
    return _per_item(lambda rng: rng.random(tuple(shape_per_item)), indices, seed, stream)


def _per_item(
    draw: Callable[[np.random.Generator], np.ndarray], indices: Iterable[int], seed: int, stream: Sequence[int | str]
) -> torch.Tensor:
    # NumPy's generators: torch's CPU ones use only 32 bits of a seed, so some of 100,000 images would share one.
    items = [draw(numpy_generator(seed, *stream, int(index))) for index in indices]
    if not items:
        return torch.from_numpy(draw(numpy_generator(seed, *stream))[None][:0].copy())
    return torch.from_numpy(np.stack(items))
