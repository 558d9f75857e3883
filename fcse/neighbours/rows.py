"""Embeddings as unit rows, whatever precision they were kept in."""

import torch.nn.functional as F
from torch import Tensor

from fcse.errors import InputError


def unit_rows(embeddings: Tensor) -> Tensor:
    """Each row scaled to length 1; a zero row stays zero, and has cosine 0 with everything.

    Args:
        embeddings: (n, D) float, in any precision.

    Returns:
        (n, D) float32, on the same device.

    Raises:
        InputError: an entry is infinite or no number.
        ValueError: another shape.
    """
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be (n, D), got {tuple(embeddings.shape)}")
    rows = embeddings.float()
    if not rows.isfinite().all():
        raise InputError(
            "the embeddings hold numbers that are not finite: embed the corpus in float32"
        )
    return F.normalize(rows, dim=1)
