"""IFND: pairs of one pseudo-label are no negatives.

Source: Chen et al., ICLR 2022 (arXiv 2106.03719), on images. Every few hundred steps the corpus is
clustered with the encoder as it is. The labels in the top share by confidence are kept, a share
that grows linearly with training. Pairs with the same kept label leave the denominator
("elimination").

Where this differs from the authors:
- Sentences, not images.
- One number of clusters; they take a hierarchy of several.
- Mini-batch k-means.
- Confidence is the softmax share of the own centroid among all, by cosine; its temperature,
  `TEMPERATURE`, is ours.
- "Attraction", which makes positives of such pairs, is not built: it was less stable there."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fcse.errors import InputError
from fcse.methods import Batch, Method, Moments, Start
from fcse.objectives import require, require_share

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class IFND(Method):
    """Settings of IFND (Chen et al. 2021)."""

    acceptance: float = 0.5
    """Share of pseudo-labels kept at the end, 0 to 1; equal ones make no negatives."""
    clusters: int = 500
    """Clusters that give the pseudo-labels, >= 2."""
    cluster_steps: int | None = None
    """Cluster the corpus anew every so many steps, >= 1; else every quarter of the run, at most
    200."""

    label = "IFND"
    switches = ("acceptance",)

    def __post_init__(self) -> None:
        require_share("ifnd.acceptance", self.acceptance)
        require("ifnd.clusters", self.clusters, 2)
        if self.cluster_steps is not None:
            require("ifnd.cluster_steps", self.cluster_steps, 1)

    def begin(self, start: Start) -> Moments:
        """Raise InputError where the corpus has fewer sentences than clusters."""
        if self.clusters > len(start.corpus):
            raise InputError(
                f"ifnd.clusters must be at most {len(start.corpus)}, the sentences of the corpus, "
                f"got {self.clusters}"
            )
        return _Elimination(self, start)


class _Elimination(Moments):
    def __init__(self, settings: IFND, start: Start) -> None:
        self.settings, self.start = settings, start
        self.labels: np.ndarray | None = None

    def before_step(self, step: int) -> None:
        settings, config = self.settings, self.start.config
        every = settings.cluster_steps or min(200, max(1, config.steps // 4))
        if step > 1 and (step - 1) % every == 0:
            share = accepted(step - 1, config.steps, settings.acceptance)
            embeddings = self.start.corpus.embed(self.start.encoder)
            self.labels = pseudo_labels(embeddings, settings.clusters, share, config.seed)

    def numbers(self, batch: Batch) -> "Tensor | None":
        import torch

        if self.labels is None:
            return None
        rows = batch.sentences.rows.astype(np.int64)
        labels = torch.from_numpy(np.where(rows >= 0, self.labels[rows], -1))
        return labels.where(labels >= 0, -1 - torch.arange(len(labels)))

    def state(self) -> "dict[str, Tensor]":
        import torch

        return {} if self.labels is None else {"labels": torch.from_numpy(self.labels)}

    def restore(self, state: "dict[str, Tensor]") -> None:
        self.labels = state["labels"].numpy() if state else None


TEMPERATURE = 0.05
"""Divisor of the cosines in the confidence; that of the loss."""

_TOLERANCE = 1e-2
"""Where the centroids' moves, in variances of the embeddings, count as none: some ten passes."""

_CHUNK_ROWS = 4096
"""Sentences whose confidence is computed at a time: 33 MB for 1,000 clusters."""


def accepted(step: int, steps: int, acceptance: float) -> float:
    """The share of labels to keep at a step of a run: linear from 0 at step 0 to `acceptance`."""
    require_share("acceptance", acceptance)
    return acceptance * step / steps


def pseudo_labels(
    embeddings: "np.ndarray | Tensor", clusters: int, share: float, seed: int
) -> np.ndarray:
    """The cluster of every sentence whose confidence is in the top share, -1 for the others.

    k-means on unit rows; a sentence's confidence is the softmax over its cosines to all centroids,
    divided by `TEMPERATURE`, at its own. Equal confidences go by the lower index. The same
    arguments give the same labels on the same machine. Memory: the embeddings once more in
    float32, and some 50 bytes a sentence.

    Args:
        embeddings: (n, D) float32 or float16, on the CPU.
        clusters: 2 to n.
        share: 0 to 1, of the labels to keep; nothing is clustered where it keeps none.
        seed: of the clustering, 0 to 2**32 - 1.

    Returns: (n,) int64, 0 to clusters - 1, or -1 for no cluster. floor(share * n) labels are kept.
    InputError: clusters or share is out of its range, or an embedding is not finite. ValueError:
    another shape."""
    import torch
    from sklearn.cluster import MiniBatchKMeans  # takes a second

    from fcse.encoder.nearest import finite_unit_rows

    n = len(embeddings)
    require_share("share", share)
    if not 2 <= clusters <= n:
        raise InputError(
            f"clusters must be from 2 to {n}, the sentences of the corpus, got {clusters}"
        )
    labels = np.full(n, -1, dtype=np.int64)
    count = math.floor(share * n)
    if not count:
        return labels
    x = finite_unit_rows(torch.as_tensor(embeddings)).numpy()
    # Stopping by the inertia instead would depend on the order in which threads add it up.
    k_means = MiniBatchKMeans(
        clusters, random_state=seed, tol=_TOLERANCE, max_no_improvement=None
    ).fit(x)
    confidence = _confidence(x, k_means.cluster_centers_, k_means.labels_)
    kept = np.argsort(-confidence, kind="stable")[:count]
    labels[kept] = k_means.labels_[kept]
    return labels


def _confidence(x: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    import torch
    from scipy.special import softmax

    from fcse.encoder.nearest import finite_unit_rows

    centroids = finite_unit_rows(torch.from_numpy(centroids)).numpy()
    confidence = np.empty(len(x))
    for start in range(0, len(x), _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        # In float64, where a share so near 1 that it ties with others is rarer.
        cosines = (x[chunk] @ centroids.T).astype(np.float64)
        shares = softmax(cosines / TEMPERATURE, axis=1)
        confidence[chunk] = shares[np.arange(len(shares)), labels[chunk]]
    return confidence
