"""How good are the embeddings: rank correlation with people, alignment and uniformity."""

from collections.abc import Sequence

import numpy as np
import scipy.stats
import torch
from torch import Tensor

from fcse import processes
from fcse.data import Aggregate, SentencePairs, load_lee, load_sts
from fcse.encoder.precision import Precision
from fcse.encoder.sentence_encoder import SentenceEncoder

_BLOCK = 2048
"""Side of the square of similarities that `uniformity` holds at a time: 16 MiB in float32."""


def spearman(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation of two (n,), ties averaged: -1 to 1, NaN if one is constant."""
    return float(scipy.stats.spearmanr(x, y).statistic)


def embed_pairs(
    encoder: SentenceEncoder, tasks: Sequence[SentencePairs], precision: Precision = "float32"
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each task u, v: unit-length embeddings (n, D) float32 of both sides, row i of pair i.

    Each distinct sentence is encoded once."""
    row: dict[str, int] = {}
    for pairs in tasks:
        for sentence in (*pairs.left, *pairs.right):
            row.setdefault(sentence, len(row))
    x = processes.encode(encoder, list(row), precision)
    return [(x[[row[s] for s in pairs.left]], x[[row[s] for s in pairs.right]]) for pairs in tasks]


def pair_similarities(
    encoder: SentenceEncoder, tasks: Sequence[SentencePairs], precision: Precision = "float32"
) -> list[np.ndarray]:
    """Cosine similarity of every pair of each task: (n,) float32 each."""
    return [(u * v).sum(axis=1) for u, v in embed_pairs(encoder, tasks, precision)]


def aggregate_spearman(
    similarity: np.ndarray, pairs: SentencePairs, aggregate: Aggregate = "all"
) -> float:
    """100 x Spearman of a task, its parts taken together as `aggregate` says.

    "all": one correlation over all pairs of all parts, what SimCSE and its successors report.
    "mean": mean of the parts' correlations; "wmean": the same weighted by their pairs. For a task
    of one part all three are the same."""
    if aggregate == "all":
        return 100 * spearman(similarity, pairs.gold)
    parts = subset_scores(similarity, pairs).values()
    weights = [part["pairs"] for part in parts] if aggregate == "wmean" else None
    return float(np.average([part["spearman"] for part in parts], weights=weights))


def subset_scores(similarity: np.ndarray, pairs: SentencePairs) -> dict[str, dict[str, float]]:
    """100 x Spearman under "spearman" and the count under "pairs", for each part of a task."""
    subsets = np.array(pairs.subsets)
    return {
        name: {
            "spearman": 100 * spearman(similarity[subsets == name], pairs.gold[subsets == name]),
            "pairs": int((subsets == name).sum()),
        }
        for name in dict.fromkeys(pairs.subsets)
    }


def judge(
    encoder: SentenceEncoder, pairs: SentencePairs, precision: Precision = "float32"
) -> dict[str, float]:
    """Score an encoder on judged pairs: "spearman" (x 100), "alignment" and "uniformity".

    SimCSE's convention: alignment over the pairs with a human score above 4 of 5 of the scale,
    uniformity over all distinct sentences of both sides."""
    return judge_tasks(encoder, [pairs], precision)[0]


def judge_tasks(
    encoder: SentenceEncoder, tasks: Sequence[SentencePairs], precision: Precision = "float32"
) -> list[dict[str, float]]:
    """`judge` for each task, every distinct sentence of all of them encoded once."""
    results = []
    for (u, v), pairs in zip(embed_pairs(encoder, tasks, precision), tasks, strict=True):
        positive = pairs.gold > 0.8 * pairs.maximum
        distinct = np.unique([*pairs.left, *pairs.right], return_index=True)[1]
        found = {
            "spearman": 100 * spearman((u * v).sum(axis=1), pairs.gold),
            "alignment": alignment(u[positive], v[positive]),
            "uniformity": uniformity(np.concatenate([u, v])[distinct]),
        }
        results.append(found)
    return results


def alignment(u: Tensor | np.ndarray, v: Tensor | np.ndarray) -> float:
    """E ||u - v||^2 of positive pairs, (n, D) float each, on the unit sphere: 0 to 4.

    Lower is better. Wang & Isola 2020 with alpha = 2. What makes published values differ:

    - Inputs are scaled to unit length here, so ||u - v||^2 = 2 - 2 cos(u, v); the distance itself
      (alpha = 1) gives another number.
    - SimCSE (Gao et al. 2021, figure 2) and Focal-InfoNCE take the STS-B pairs that people score
      above 4 of 5 as positives, 4 itself excluded, and embeddings without dropout and head: see
      `judge`. Two dropout views of one sentence give far lower values."""
    u, v = _unit(u), _unit(v)
    return float((u - v).square().sum(dim=1).double().mean())


def uniformity(x: Tensor | np.ndarray, t: float = 2) -> float:
    """log E exp(-t ||x - y||^2) over the pairs of rows of (n, D) float, n >= 2; 0 if all are one.

    Lower is better. Wang & Isola 2020 with t = 2. What makes published values differ:

    - Inputs are scaled to unit length here, and the distance is squared.
    - Pairs are those of two different rows; a row with itself, at distance 0, would raise the
      mean. Equal rows at different places do count: hand in each sentence once.
    - SimCSE (Gao et al. 2021, figure 2) and Focal-InfoNCE take all sentences of STS-B, not the
      positives alone, without dropout and head: see `judge`.
    - The logarithm is taken of the mean over all pairs, not averaged over batches."""
    x = _unit(x)
    blocks = x.split(_BLOCK)
    total = 0.0  # square by square, in float64, so that memory grows with n and not with its square
    for i, rows in enumerate(blocks):
        for j, columns in enumerate(blocks[: i + 1]):
            kernel = (rows @ columns.T).mul_(-2).add_(2).clamp_(min=0).mul_(-t).exp_()
            if i == j:
                kernel.fill_diagonal_(0)  # a point with itself is no pair
            total += (1 if i == j else 2) * float(kernel.sum(dtype=torch.float64))
    return float(np.log(total / (len(x) * (len(x) - 1))))


def _unit(x: Tensor | np.ndarray) -> Tensor:
    x = torch.as_tensor(x)
    return torch.nn.functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


def score(
    encoder: SentenceEncoder, judged: dict[str, SentencePairs], precision: Precision = "float32"
) -> dict[str, float]:
    """Spearman x 100 on each set of pairs under its name, `_alignment` and `_uniformity` beside."""
    return {
        f"{name}_{measure}".removesuffix("_spearman"): value
        for name, pairs in judged.items()
        for measure, value in judge(encoder, pairs, precision).items()
    }


def judged_pairs(metric: str = "last") -> dict[str, SentencePairs]:
    """What a run is scored on as it goes: Lee, and the STS-B dev split where it is the metric."""
    judged = {"lee": load_lee()}
    if metric == "stsb_dev":
        judged["stsb_dev"] = load_sts("STSBenchmark", "dev")
    return judged
