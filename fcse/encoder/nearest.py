"""Exact search for the nearest sentences of a corpus, in the memory of a tile."""

import math

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fcse.errors import InputError
from fcse.losses import unit_rows


@torch.inference_mode()
def nearest(
    embeddings: np.ndarray | Tensor,
    k: int,
    sentence_ids: np.ndarray | Tensor | None = None,
    device: str | torch.device = "cpu",
    tile: int = 1024,
) -> np.ndarray:
    """The k nearest neighbours of every sentence by cosine, nearest first: (n, k) int32.

    The sentence and its repeats are left out. Exact: every pair is compared, in float32. Equal
    cosines go by the lower index; cosines that differ by less than the rounding of float32, some
    1e-7, may come in either order. The same arguments give the same neighbours on one machine.

    Memory: pairs are compared in square tiles, and a row of tiles keeps only its k best. A million
    sentences of 384 dimensions with k = 64 take 2.4 GB: 1.54 for embeddings in float32 (0.77 in
    float16: rows are scaled and widened a tile at a time), 0.26 for neighbours, up to 0.1 for a
    tile of 1024 x 1024 and what sorts it, 0.5 for Python and torch.

    Args:
        embeddings: (n, D) float32 or float16, n <= 2**31; on the CPU they are not copied.
        sentence_ids: (n,) integers, equal where rows are one sentence; None: no repeats.
        device: where to compute, and where embeddings, ids and tile take their room.
        tile: sentences along either side of a tile.

    InputError: k is below 1 or above what each sentence has, or an embedding is not finite.
    ValueError: another shape, or a tile below 1."""
    if tile < 1:
        raise ValueError(f"tile must be at least 1, got {tile}")
    rows = torch.as_tensor(embeddings, device=device)
    n = len(rows)
    ids = torch.arange(n) if sentence_ids is None else torch.as_tensor(sentence_ids)
    if ids.shape != (n,):
        raise ValueError(f"sentence_ids must be ({n},), one a row, got {tuple(ids.shape)}")
    ids = ids.to(rows.device, torch.int64)
    repeats = ids.unique(return_counts=True)[1]
    most = n - int(repeats.max()) if n else 0
    if not 1 <= k <= most:
        raise InputError(
            f"k must be from 1 to {most}, the most that each of the {n} sentences of the corpus "
            f"has beside itself and its repeats, got {k}"
        )
    neighbours = np.empty((n, k), dtype=np.int32)
    tiles = [slice(start, min(start + tile, n)) for start in range(0, n, tile)]
    for anchors in tqdm(tiles, "neighbours", unit=" rows of tiles", delay=2, leave=False):
        u = finite_unit_rows(rows[anchors])
        near = u.new_full((len(u), k), -math.inf)
        which = torch.zeros(near.shape, dtype=torch.int64, device=u.device)
        for candidates in tiles:
            cosines = u @ finite_unit_rows(rows[candidates]).T
            cosines.masked_fill_(ids[anchors, None] == ids[candidates], -math.inf)
            near, which = _merged(near, which, cosines, candidates.start)
        neighbours[anchors] = which.cpu().numpy()
    return neighbours


def _merged(near: Tensor, which: Tensor, cosines: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """The k best so far and their columns, with those of a further tile that are nearer.

    Tiles come in the order of their columns, so that among equals the one that is there already
    has the lower index, and a stable sort leaves it in front."""
    k = near.shape[1]
    row, column = (cosines > near[:, -1:]).nonzero(as_tuple=True)
    # Beyond the first tiles these are few: moved together, they are sorted with little work.
    count = row.bincount(minlength=len(near))
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    shape = (len(near), int(count.max()))
    further, further_columns = near.new_full(shape, -math.inf), which.new_zeros(shape)
    further[row, place] = cosines[row, column]
    further_columns[row, place] = first + column
    near, which = torch.cat([near, further], dim=1), torch.cat([which, further_columns], dim=1)
    order = near.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return near.gather(1, order), which.gather(1, order)


def finite_unit_rows(embeddings: Tensor) -> Tensor:
    """Each row of (n, D) scaled to length 1 in float32; an `InputError` where one is not finite.

    A zero row stays zero, and has cosine 0 with all."""
    rows = unit_rows(embeddings.float())
    if not embeddings.isfinite().all():
        raise InputError(
            "the embeddings hold numbers that are not finite: embed the corpus in float32"
        )
    return rows
