"""IFND: pairs of one pseudo-label are no negatives.

Source: Chen et al., ICLR 2022 (arXiv 2106.03719), on images. As training goes on the corpus is
clustered with the encoder as it is. The labels in the top share by confidence are kept, a share
that grows from one clustering to the next. Pairs with the same kept label leave the denominator
("elimination"). How many ordered pairs of each batch these are is logged as `ifnd.left_out`.

The settings are this kit's: with 100 clusters of the packaged encoder and all labels kept, 17 of
the 992 ordered pairs of a batch of 32 from the packaged corpus are left out, 68 of the 4,032 of 64.
Their repository could not be had; where this differs from the paper:
- Sentences, not images.
- Clustered three times a run; there after each epoch.
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

    acceptance: float = 1.0
    """Share of pseudo-labels kept from the last clustering on, 0 to 1; equal ones make no
    negatives."""
    clusters: int = 100
    """Clusters that give the pseudo-labels, >= 2."""
    cluster_steps: int | None = None
    """Cluster the corpus anew every so many steps, >= 1; else after each quarter of the run."""

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
        self.left_out = self.steps = 0

    def before_step(self, step: int) -> None:
        settings, config = self.settings, self.start.config
        every = settings.cluster_steps or max(1, config.steps // 4)
        if step > 1 and (step - 1) % every == 0:
            share = accepted(step - 1, config.steps, every, settings.acceptance)
            embeddings = self.start.corpus.embed(self.start.encoder)
            self.labels = pseudo_labels(embeddings, settings.clusters, share, config.seed)

    def numbers(self, batch: Batch) -> "Tensor | None":
        import torch

        if self.labels is None:
            return None
        rows = batch.sentences.rows.astype(np.int64)
        labels = torch.from_numpy(np.where(rows >= 0, self.labels[rows], -1))
        return labels.where(labels >= 0, -1 - torch.arange(len(labels)))

    def counted(self, batch: Batch) -> dict[str, float]:
        self.steps += 1
        found = 0 if self.labels is None else pairs_of_a_label(self.labels, batch)
        self.left_out += found
        return {"left_out": found}

    def remark(self) -> str:
        mean = self.left_out / max(1, self.steps)
        if round(mean):
            return ""
        return (
            f"ifnd left out {mean:.2f} pairs a step, next to nothing: lower ifnd.clusters, raise "
            "ifnd.acceptance, or take larger batches"
        )

    def state(self) -> "dict[str, Tensor]":
        import torch

        found = {"counts": torch.tensor([self.left_out, self.steps])}
        return found if self.labels is None else found | {"labels": torch.from_numpy(self.labels)}

    def restore(self, state: "dict[str, Tensor]") -> None:
        self.labels = state["labels"].numpy() if "labels" in state else None
        if "counts" in state:
            self.left_out, self.steps = state["counts"].tolist()


def pairs_of_a_label(labels: np.ndarray, batch: Batch) -> int:
    """How many ordered pairs of a batch's own sentences have one label: what is left out.

    labels: (n,) int64 by rows of the corpus, -1 for none."""
    kept = labels[batch.sentences.rows[: batch.size].astype(np.int64)]
    counts = np.unique(kept[kept >= 0], return_counts=True)[1]
    return int((counts * (counts - 1)).sum())


TEMPERATURE = 0.05
"""Divisor of the cosines in the confidence; that of the loss."""

_TOLERANCE = 1e-2
"""Where the centroids' moves, in variances of the embeddings, count as none: some ten passes."""

_CHUNK_ROWS = 4096
"""Sentences whose confidence is computed at a time: 33 MB for 1,000 clusters."""


def accepted(step: int, steps: int, every: int, acceptance: float) -> float:
    """The share of labels to keep from a clustering after `step` steps, a multiple of `every`.

    It grows by the same share from one clustering of the run to the next; the last one, ahead of a
    further step, reaches `acceptance`, 0 to 1."""
    require_share("acceptance", acceptance)
    return acceptance * (step // every) / ((steps - 1) // every)


def pseudo_labels(
    embeddings: "np.ndarray | Tensor", clusters: int, share: float, seed: int
) -> np.ndarray:
    """The cluster of every sentence whose confidence is in the top share, -1 for the others.

    k-means on unit rows; a sentence's confidence is the softmax over its cosines to all centroids,
    divided by `TEMPERATURE`, at its own. Equal confidences go by the lower index. The same
    arguments give the same labels on the same machine. Memory: the embeddings once more in
    float32, and some 50 bytes a sentence.

    embeddings: (n, D) float32 or float16, on the CPU. clusters: 2 to n. share: 0 to 1, of the
    labels to keep; nothing is clustered where it keeps none. seed: 0 to 2**32 - 1.

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
    stops = {"tol": _TOLERANCE, "max_no_improvement": None}
    k_means = MiniBatchKMeans(clusters, random_state=seed, **stops).fit(x)
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
