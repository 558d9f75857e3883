"""What a loss does to a batch, and what training did to a space: numbers behind the pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fcse import losses
from fcse.encoder import SentenceEncoder
from fcse.losses import Modulate, Objective

VARIANTS: dict[str, dict[str, Any]] = {
    "info_nce": {"objective": "info_nce"},
    "focal_info_nce": {"objective": "focal_info_nce"},
    "positive": {"modulate": "positive"},
    "negative": {"modulate": "negative"},
    "stop_gradient": {"stop_gradient": True},
    "hardness_info_nce": {"objective": "hardness_info_nce"},
}
"""Key of the figures -> what sets it apart among the arguments of `losses.gradient_weights`."""

ALPHA = 9.0
"""The hardness weight of Lan et al. 2025, in tables and curves."""

Pulls = tuple[np.ndarray, np.ndarray]


def batch_similarities(
    encoder: SentenceEncoder, sentences: Sequence[str], max_length: int = 32, seed: int = 0
) -> Tensor:
    """The similarity matrix that the loss would see for this batch: dropout on, head on.

    Args:
        encoder: its mode and the random state are left as they were.
        sentences: N sentences.
        max_length: tokens kept, as in training.
        seed: of the two dropout masks.

    Returns:
        (N, N) float32, on the CPU.
    """
    was_training = encoder.training
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        encoder.train()
        u, v = encoder(encoder.tokenize(sentences, max_length))
    encoder.train(was_training)
    return losses.similarity_matrix(u, v).cpu().clone()


def curves(
    temperature: float = 0.05,
    m: float = 0.3,
    objectives: Sequence[str] = ("info_nce", "focal_info_nce"),
    points: int = 201,
) -> pd.DataFrame:
    """Logit and slope of one similarity s in [-1, 1], as a negative and as a positive.

    Args:
        temperature, m: as in `losses.logits`.
        objectives: keys out of `VARIANTS`.
        points: how many values of s.

    Returns:
        Columns "objective", "similarity", "logit", "slope" (of a negative), "positive_logit",
        "positive_slope".
    """
    s = torch.linspace(-1, 1, points, dtype=torch.float64)
    # Row i holds s_i twice: on the diagonal as a positive, in column `points + i` as a negative.
    sim = torch.cat([torch.diag(s)] * 2, dim=1).requires_grad_()
    frames = []
    for key in objectives:
        logit = losses.logits(sim, temperature, m, **logit_arguments(key))
        (slope,) = torch.autograd.grad(logit.sum(), sim)
        columns = {"objective": key, "similarity": s.numpy()}
        for prefix, diagonal in (("", points), ("positive_", 0)):
            columns[f"{prefix}logit"] = logit.detach().diagonal(diagonal).numpy()
            columns[f"{prefix}slope"] = slope.diagonal(diagonal).numpy()
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def logit_arguments(key: str) -> dict[str, Any]:
    """What `losses.logits` takes for a key of `VARIANTS`."""
    arguments = {"modulate": "both"} | VARIANTS[key]
    objective = arguments.pop("objective", "focal_info_nce")
    modulate = losses.effective_modulation(objective, arguments["modulate"])
    alpha = {"alpha": ALPHA} if objective == "hardness_info_nce" else {}
    return arguments | {"modulate": modulate} | alpha


def negative_pulls(sim: Tensor, objective: Objective = "focal_info_nce", **loss: Any) -> Pulls:
    """Similarity of every negative of a batch and dL/ds of its anchor's own loss.

    Args:
        sim: (N, M) float, positives on the diagonal.
        objective: the loss.
        loss: its parameters, as in `losses.gradient_weights`.

    Returns:
        similarities, pulls: (N * (M - 1),) float each, row by row. A pull is N times the entry of
        `losses.gradient_weights`: that of one row, before the mean.
    """
    weights = len(sim) * losses.gradient_weights(sim, objective, **loss)
    negative = ~torch.eye(*sim.shape, dtype=torch.bool)
    return sim[negative].numpy(), weights[negative].numpy()


def decile_shares(sim: Tensor, **loss: Any) -> np.ndarray:
    """Share of the absolute pull on all negatives that each tenth of them gets: (10,), sums to 1.

    Args:
        sim: (N, M) float, positives on the diagonal.
        loss: as in `negative_pulls`. Tenths run from the least similar to the hardest.
    """
    s, pull = negative_pulls(sim, **loss)
    pull = np.abs(pull)[np.argsort(s, kind="stable")]
    return np.array([tenth.sum() for tenth in np.array_split(pull, 10)]) / pull.sum()


def pull_by_decile(
    sim: Tensor,
    temperature: float = 0.05,
    m: float = 0.3,
    objectives: Sequence[str] = ("info_nce", "focal_info_nce"),
) -> pd.DataFrame:
    """How the pull on negatives spreads over deciles of similarity, for several losses.

    Args:
        sim: (N, M) float, positives on the diagonal.
        temperature, m: as in `losses.logits`.
        objectives: keys out of `VARIANTS`.

    Returns:
        Columns "objective", "decile" (1 to 10, 10 = most similar), "share" (of the absolute pull
        on all negatives, 0 to 1), "similarity" (mean in the decile).
    """
    s = np.sort(sim[~torch.eye(*sim.shape, dtype=torch.bool)].numpy())
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "objective": key,
                    "decile": range(1, 11),
                    "similarity": [tenth.mean() for tenth in np.array_split(s, 10)],
                    "share": decile_shares(sim, temperature=temperature, m=m, **VARIANTS[key]),
                }
            )
            for key in objectives
        ],
        ignore_index=True,
    )


def hardest_share(
    sim: Tensor,
    objective: Objective = "focal_info_nce",
    temperature: float = 0.05,
    m: float = 0.3,
    modulate: Modulate = "both",
    fraction: float = 0.1,
) -> float:
    """Share of the absolute pull on negatives that the hardest `fraction` of them get: 0 to 1."""
    s, pull = negative_pulls(sim, objective, temperature=temperature, m=m, modulate=modulate)
    hardest = np.argsort(-s, kind="stable")[: round(fraction * len(s))]
    return float(np.abs(pull[hardest]).sum() / np.abs(pull).sum())


def ranked_negatives(
    sim: Tensor, sentences: Sequence[str], temperature: float = 0.05, m: float = 0.3
) -> pd.DataFrame:
    """Every negative pair of a batch with its pull under both objectives, hardest first.

    Returns:
        Columns "similarity", "info_nce", "focal_info_nce" (pulls, see `negative_pulls`), "anchor",
        "negative" (the sentences).
    """
    n = len(sim)
    i, j = np.nonzero(~np.eye(n, dtype=bool))
    columns = {"similarity": sim.numpy()[i, j]}
    for objective in ("info_nce", "focal_info_nce"):
        columns[objective] = negative_pulls(sim, objective, temperature=temperature, m=m)[1]
    columns["anchor"] = [sentences[k] for k in i]
    columns["negative"] = [sentences[k] for k in j]
    table = pd.DataFrame(columns)
    return table.sort_values("similarity", ascending=False, ignore_index=True)


def neighbourhood_purity(x: np.ndarray, labels: Sequence[str], k: int = 10) -> float:
    """Share of a point's k nearest neighbours that carry its own label, mean over points: 0 to 1.

    Args:
        x: (n, D) float, rows of unit length for neighbours by cosine; n > k.
        labels: n labels.
    """
    codes = np.unique(np.asarray(labels), return_inverse=True)[1]
    similarity = x @ x.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argpartition(-similarity, k, axis=1)[:, :k]
    return float((codes[nearest] == codes[:, None]).mean())


def below_resting_point(
    sim: Tensor, m_values: Sequence[float], temperature: float = 0.05
) -> pd.DataFrame:
    """How many negatives lie below s = -m/2, and how much of the pull draws them to the anchor.

    Args:
        sim: (N, M) float, positives on the diagonal.
        m_values: values of m to try.
        temperature: tau > 0.

    Returns:
        Columns "m", "resting_point", "below" (share of the negatives, 0 to 1), "pull_towards"
        (share of the absolute pull on negatives that raises their similarity, 0 to 1).
    """
    rows = []
    for m in m_values:
        s, pull = negative_pulls(sim, temperature=temperature, m=m)
        rows.append(
            {
                "m": m,
                "resting_point": -m / 2,
                "below": float((s < -m / 2).mean()),
                "pull_towards": float(np.abs(pull[pull < 0]).sum() / np.abs(pull).sum()),
            }
        )
    return pd.DataFrame(rows)


def umap_map(x: np.ndarray, n_neighbors: int = 15, seed: int = 0) -> np.ndarray:
    """A UMAP of the rows of x by cosine (McInnes et al. 2018): (n, D) float -> (n, 2) float32."""
    import umap  # compiles on import, which takes seconds

    reducer = umap.UMAP(n_neighbors=n_neighbors, metric="cosine", random_state=seed, n_jobs=1)
    return reducer.fit_transform(x)
