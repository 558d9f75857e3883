"""What a loss does to a batch, and what training did to a space: numbers behind the pictures."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fcse import losses
from fcse.encoder import SentenceEncoder
from fcse.losses import ALPHA, Modulate, Objective

VARIANTS: dict[str, dict[str, Any]] = {
    "info_nce": {"objective": "info_nce"},
    "focal_info_nce": {"objective": "focal_info_nce"},
    "positive": {"modulate": "positive"},
    "negative": {"modulate": "negative"},
    "stop_gradient": {"stop_gradient": True},
    "hardness_info_nce": {"objective": "hardness_info_nce"},
}
"""Key of the figures -> what sets it apart among the arguments of `losses.gradient_weights`."""


def rank(key: str) -> int:
    """Where figures and tables put a loss: in the order of `VARIANTS`, what is not in it behind."""
    keys = [*VARIANTS, key]
    return keys.index(key)


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


def readout_similarities(encoder: SentenceEncoder, sentences: Sequence[str]) -> Tensor:
    """Cosines of the sentences as evaluation reads them, without dropout and head: a teacher's.

    Returns:
        (N, N) float32, on the CPU.
    """
    embeddings = torch.from_numpy(encoder.encode(sentences))
    return losses.similarity_matrix(embeddings, embeddings)


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
    tables = {
        key: curve(points, temperature=temperature, m=m, **VARIANTS[key]) for key in objectives
    }
    return pd.concat(tables, names=["objective"]).reset_index("objective").reset_index(drop=True)


def curve(points: int = 201, **loss: Any) -> pd.DataFrame:
    """Logit and slope of one similarity under one loss: `curves` for any parameters.

    Args:
        points: how many values of s in [-1, 1].
        loss: as in `losses.gradient_weights`. A margin turns negatives by the whole of it: those
            that the teacher finds unrelated.

    Returns:
        The columns of `curves` but "objective".
    """
    s = torch.linspace(-1, 1, points, dtype=torch.float64)
    # Row i holds s_i twice: on the diagonal as a positive, in column `points + i` as a negative.
    sim = torch.cat([torch.diag(s)] * 2, dim=1).requires_grad_()
    arguments = logit_arguments(**loss) | {"teacher": torch.zeros_like(sim)}
    logit = losses.logits(sim, **arguments)
    (slope,) = torch.autograd.grad(logit.sum(), sim)
    columns = {"similarity": s.numpy()}
    for prefix, diagonal in (("", points), ("positive_", 0)):
        columns[f"{prefix}logit"] = logit.detach().diagonal(diagonal).numpy()
        columns[f"{prefix}slope"] = slope.diagonal(diagonal).numpy()
    return pd.DataFrame(columns)


def logit_arguments(
    objective: Objective = "focal_info_nce",
    modulate: Modulate = "both",
    alpha: float = ALPHA,
    focal_weight: bool = False,
    **others: Any,
) -> dict[str, Any]:
    """What `losses.logits` takes for a loss named as in `losses.gradient_weights`.

    The focal weight is not among it: it acts on a row's loss as a whole.
    """
    return others | {
        "modulate": losses.effective_modulation(objective, modulate),
        "alpha": losses.effective_alpha(objective, alpha),
    }


def resting_point(
    m: float = 0.3, stop_gradient: bool = False, margin: float = 0.0, **loss: Any
) -> float | None:
    """The similarity at which a modulated negative is not pulled: -m/2, or -m with stop_gradient.

    Args:
        m, stop_gradient, margin, loss: as in `losses.gradient_weights`. A margin counts in full,
            as for a negative that the teacher finds unrelated: it rests where it is turned to
            that point.

    Returns:
        None where the negatives are not modulated, or no angle is turned to that point.
    """
    if logit_arguments(**loss)["modulate"] not in ("both", "negative"):
        return None
    rest = -m if stop_gradient else -m / 2
    if not margin:
        return rest
    angle = math.acos(rest) + margin if abs(rest) <= 1 else math.inf
    return math.cos(angle) if angle <= math.pi else None


def candidates(sim: Tensor, sentences: Sequence[str], anchor: int, **loss: Any) -> pd.DataFrame:
    """The softmax of one row: how likely each candidate counts as the anchor's other view.

    Args:
        sim: (N, N) float, positives on the diagonal.
        sentences: the batch, N sentences.
        anchor: the row, 0 to N - 1.
        loss: as in `losses.gradient_weights`.

    Returns:
        N rows, most similar first: "candidate" (the column of `sim`), "sentence", "similarity",
        "info_nce" (its probability under InfoNCE at the same temperature), "chosen" (under
        `loss`). Each probability sums to 1.
    """
    arguments = logit_arguments(**loss)
    plain = logit_arguments(**loss | {"objective": "info_nce", "margin": 0.0})
    table = pd.DataFrame(
        {
            "candidate": range(len(sim)),
            "sentence": list(sentences),
            "similarity": sim[anchor].numpy(),
            "info_nce": losses.logits(sim, **plain)[anchor].softmax(dim=0).numpy(),
            "chosen": losses.logits(sim, **arguments)[anchor].softmax(dim=0).numpy(),
        }
    )
    return table.sort_values("similarity", ascending=False, kind="stable", ignore_index=True)


def negative_pulls(
    sim: Tensor, objective: Objective = "focal_info_nce", **loss: Any
) -> tuple[np.ndarray, np.ndarray]:
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


def anchor_negatives(
    sim: Tensor, anchor: int, temperature: float = 0.05, m: float = 0.3
) -> pd.DataFrame:
    """The negatives of one anchor with their pull under each of the three objectives.

    Args:
        sim: (N, N) float, positives on the diagonal.
        anchor: the row, 0 to N - 1.
        temperature, m: as in `losses.logits`; the hardness weight is `ALPHA`.

    Returns:
        N - 1 rows, most similar first: "negative" (the column of `sim`), "similarity", and a pull
        under the name of each objective, see `negative_pulls`.
    """
    row = {"negative": range(len(sim)), "similarity": sim[anchor].numpy()}
    for objective in get_args(Objective):
        weights = losses.gradient_weights(sim, objective, temperature, m, alpha=ALPHA)
        row[objective] = len(sim) * weights[anchor].numpy()
    table = pd.DataFrame(row).drop(index=anchor)
    return table.sort_values("similarity", ascending=False, kind="stable", ignore_index=True)


def likely_false_negatives(
    sim: Tensor, labels: Sequence[str], quantile: float = 0.9
) -> pd.DataFrame:
    """Pairs of a batch that count as negatives and may well not be: alike, and of one label.

    Args:
        sim: (N, N) float, positives on the diagonal.
        labels: N labels, such as the article that a sentence comes from.
        quantile: 0 to 1; a pair is alike if its similarity reaches this quantile of all pairs.

    Returns:
        One row a pair, most similar first: "i" < "j" (rows of `sim`), "similarity" (the mean of
        s_ij and s_ji, which differ by dropout).
    """
    i, j = np.triu_indices(len(sim), k=1)
    similarity = ((sim + sim.T) / 2).numpy()[i, j]
    titles = np.asarray(labels)
    found = (titles[i] == titles[j]) & (similarity >= np.quantile(similarity, quantile))
    table = pd.DataFrame({"i": i[found], "j": j[found], "similarity": similarity[found]})
    return table.sort_values("similarity", ascending=False, kind="stable", ignore_index=True)


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
    """A UMAP of the rows of x by cosine (McInnes et al. 2018): (n, D) float -> (n, 2) float32.

    Distances of all pairs are held: 4 n^2 bytes.
    """
    with _umap_alone():
        import umap  # compiles on import, which takes seconds

        reducer = umap.UMAP(
            n_neighbors=n_neighbors, metric="precomputed", random_state=seed, n_jobs=1
        )
        return reducer.fit_transform(_cosine_distances(x))


def aligned_maps(
    embeddings: Mapping[str, np.ndarray], n_neighbors: int = 15, seed: int = 0
) -> dict[str, np.ndarray]:
    """Maps of the same sentences under several models, each sentence at a comparable place.

    All maps are laid out at once, with a term that holds each sentence near its place on the maps
    beside (`umap.AlignedUMAP`), so that what has moved was moved by the model.

    Args:
        embeddings: name of a model -> (n, D) float; row i is the same sentence in all. Models
            next to each other in the mapping are held together.
        n_neighbors: neighbours by cosine that a map keeps together.
        seed: equal seeds give equal maps.

    Returns:
        Name -> (n, 2) float32. A single model gets its `umap_map`. Memory: 4 n^2 bytes a model.
    """
    if len(embeddings) == 1:
        return {name: umap_map(x, n_neighbors, seed) for name, x in embeddings.items()}
    distances = [_cosine_distances(x) for x in embeddings.values()]
    same = {i: i for i in range(len(distances[0]))}
    with _umap_alone():
        import umap

        mapper = umap.AlignedUMAP(
            n_neighbors=n_neighbors, metric="precomputed", random_state=seed, transform_seed=seed
        )
        placed = mapper.fit_transform(distances, relations=[same] * (len(distances) - 1))
    return dict(zip(embeddings, map(np.asarray, placed), strict=True))


def _cosine_distances(x: np.ndarray) -> np.ndarray:
    # UMAP's own way takes minutes where this takes a second: it compiles a search for neighbours,
    # or calls a Python function for each pair.
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    distances = np.clip(1 - x @ x.T, 0, None)
    np.fill_diagonal(distances, 0)
    return distances


@contextmanager
def _umap_alone() -> Iterator[None]:
    # What it warns of is meant: a seed means one thread, and no map is inverted. Its compiler sets
    # torch's threads too, and on another number of them sums round otherwise: a run trained after
    # a map would differ in its last bits from one trained before.
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_jobs value|using precomputed metric")
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def map_trustworthiness(x: np.ndarray, xy: np.ndarray, k: int = 10) -> float:
    """How far a map's neighbours are neighbours in the full space too: 0 to 1, higher is better.

    Each of the k nearest on the map that is none of the k nearest by cosine costs its rank beyond
    k (Venna & Kaski 2001). Memory grows with n squared: 1.5 GB for 8,000 points.

    Args:
        x: (n, D) float, the embeddings; n > 2 k.
        xy: (n, 2) float, the map.
        k: neighbours looked at.
    """
    from sklearn.manifold import trustworthiness

    return float(trustworthiness(x, xy, n_neighbors=k, metric="cosine"))
