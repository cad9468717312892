"""Run work on every model of the pool, batch by batch. Finished batches are stored; processes share the work."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from guided_diffusion.dist_util import in_batches
from guided_diffusion.pool import Pool, PoolModel
from utils.pieces import Pieces
from utils.progress import progress

Work = Callable[[PoolModel, int, Tensor], dict[str, Tensor]]


def work_through(
    pool: Pool, counts: Sequence[int], work: Work, pieces: Pieces, *,
    batch: int, device: torch.device, precision: str, desc: str, other: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the results of `work` on items 0 .. counts[m] - 1 of every pool model m, model after model, on the CPU.

    Each process loads a model once, and only if `pieces` lacks some of its batches.

    work: (model, m, item numbers (N,) int64) -> tensors by name. They must not depend on how items are split into
        batches. The first is (N, ...); later ones may have rows for only some of the items.
    batch: items at once, fewer if memory is short. other: as for `costs.that_fit`.
    """
    batches = {
        f"model{m:03d}-items{start:07d}-{min(start + batch, count):07d}": (m, start, min(start + batch, count))
        for m, count in enumerate(counts)
        for start in range(0, count, batch)
    }
    mine = [(m, list(names)) for m, names in groupby(pieces.mine(list(batches)), key=lambda name: batches[name][0])]
    models = pool.each(device, precision, [m for m, _ in mine])
    with progress(total=sum(len(names) for _, names in mine), desc=desc, unit="batch") as bar:
        for (m, names), model in zip(mine, models, strict=True):
            room = pool.room(model, batch, device, other=other)
            for name in names:
                _, start, stop = batches[name]
                done = [each for _, each in in_batches(partial(work, model, m), stop - start, room, start)]
                fitted = len(next(iter(done[0].values())))
                if fitted < min(room, stop - start):  # memory was short, and will be again
                    room = pool.room(model, batch, device, other=other, found=fitted)
                pieces.keep(name, _joined(done))
                bar.update()
    return _joined(pieces.collect(list(batches)))


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
