"""What a loss does to a batch, and what training did to a space: numbers behind the pictures.

`sim` is a batch's similarities, (N, M) float or (N, N), positives on the diagonal, and an anchor a
row of it; an objective is a value or a name; columns are what is known of those of `sim`, such as
the turn of a margin, see `losses`. A pull is dL/ds of the anchor's own loss: N times an entry of
`losses.gradient_weights`."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from fcse import losses
from fcse.encoder.sentence_encoder import SentenceEncoder
from fcse.losses import PLAIN, Columns
from fcse.objectives import OBJECTIVES, FocalInfoNCE, InfoNCE, name, named

COMPARED = ("info_nce", "focal_info_nce")
"""The losses that pictures set side by side where none are named."""


def batch_similarities(
    encoder: SentenceEncoder, sentences: Sequence[str], max_length: int = 32, seed: int = 0
) -> Tensor:
    """The matrix that the loss would see for N sentences, dropout on, head on: (N, N) float32, CPU.

    The encoder's mode and the random state are left as they were. max_length: tokens kept, as in
    training. seed: of the two dropout masks."""
    was_training = encoder.training
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        encoder.train()
        u, v = encoder(encoder.tokenize(sentences, max_length))
    encoder.train(was_training)
    return losses.similarity_matrix(u, v).cpu().clone()


def readout_similarities(encoder: SentenceEncoder, sentences: Sequence[str]) -> Tensor:
    """Cosines as evaluation reads the sentences, without dropout and head: (N, N) float32, CPU."""
    embeddings = torch.from_numpy(encoder.encode(sentences))
    return losses.similarity_matrix(embeddings, embeddings)


def curve(objective: Any, columns: Columns = PLAIN, points: int = 201) -> pd.DataFrame:
    """Logit and slope of a number of similarities s in [-1, 1], as a negative and as a positive.

    Returns: Columns "similarity", "logit", "slope" (of a negative), "positive_logit",
    "positive_slope"."""
    s = torch.linspace(-1, 1, points, dtype=torch.float64)
    logit, slope = _of_each(s, objective, columns)
    found = {"similarity": s, "logit": logit.diagonal(points), "slope": slope.diagonal(points)}
    found |= {"positive_logit": logit.diagonal(), "positive_slope": slope.diagonal()}
    return pd.DataFrame({column: x.numpy() for column, x in found.items()})


def _of_each(s: Tensor, objective: Any, columns: Columns) -> tuple[Tensor, Tensor]:
    """(P, 2 P) each: row i holds s_i twice, on the diagonal as a positive, and P behind it."""
    sim = torch.cat([torch.diag(s)] * 2, dim=1)
    return _logits_and_slopes(sim, objective, replace(columns, sentence_ids=None))


def _logits_and_slopes(sim: Tensor, objective: Any, columns: Columns) -> tuple[Tensor, Tensor]:
    """(N, M) each; the slope is d logit / d similarity, that of the turns included."""
    sim = sim.detach().requires_grad_()
    logit = losses.logits(sim, objective, columns)
    (slope,) = torch.autograd.grad(logit.sum(), sim)
    return logit.detach(), slope


def curves(objectives: Sequence[Any] = COMPARED, points: int = 201) -> pd.DataFrame:
    """`curve` of several objectives, one below the other under their "name"."""
    return pd.concat([curve(o, points=points).assign(name=name(named(o))) for o in objectives])


def resting_point(objective: Any, columns: Columns = PLAIN) -> float | None:
    """The similarity at which a negative is not pulled, and drawn to its anchor below.

    That is -m/2 for Focal-InfoNCE, -m with its stop_gradient. Found for any objective where the
    slope of a negative's logit turns from below 0 to above; None where it does not turn."""
    low, high = -1.0, 1.0
    for _ in range(6):
        s = torch.linspace(low, high, 65, dtype=torch.float64)
        slope = _of_each(s, objective, columns)[1].diagonal(65)
        turns = ((slope[:-1] < 0) & (slope[1:] >= 0)).nonzero()
        if not len(turns):
            return None
        i = int(turns[0])
        low, high = s[i].item(), s[i + 1].item()
        rest = low - (high - low) * (slope[i] / (slope[i + 1] - slope[i])).item()
    return rest


def plain(objective: Any) -> InfoNCE:
    """InfoNCE at an objective's temperature, at its own where that has none."""
    return InfoNCE(getattr(objective, "temperature", InfoNCE.temperature))


def _hardest_first(rows: Any) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    return table.sort_values("similarity", ascending=False, kind="stable", ignore_index=True)


def candidates(
    sim: Tensor, sentences: Sequence[str], anchor: int, objective: Any, columns: Columns = PLAIN
) -> pd.DataFrame:
    """The softmax of one row: how likely each candidate counts as the anchor's other view.

    Returns: N rows, most similar first: "candidate" (the column of `sim`), "sentence",
    "similarity", "plain" (its probability under InfoNCE at the same temperature), "chosen" (under
    the objective). Each probability sums to 1."""
    return _hardest_first(
        {
            "candidate": range(len(sim)),
            "sentence": list(sentences),
            "similarity": sim[anchor].numpy(),
            "plain": losses.logits(sim, plain(objective))[anchor].softmax(dim=0).numpy(),
            "chosen": losses.logits(sim, objective, columns)[anchor].softmax(dim=0).numpy(),
        }
    )


def negative_pulls(
    sim: Tensor, objective: Any, columns: Columns = PLAIN
) -> tuple[np.ndarray, np.ndarray]:
    """Similarity of every negative of a batch and its pull: (N * (M - 1),) each, row by row."""
    weights = len(sim) * losses.gradient_weights(sim, objective, columns)
    return _negatives(sim), _negatives(weights)


def _negatives(x: Tensor) -> np.ndarray:
    """What is not on the diagonal."""
    return x[~torch.eye(*x.shape, dtype=torch.bool)].numpy()


def tenths(s: np.ndarray) -> list[np.ndarray]:
    """The places of ten equal parts of some similarities, from the least to the hardest tenth."""
    return np.array_split(np.argsort(s, kind="stable"), 10)


def decile_shares(sim: Tensor, objective: Any, columns: Columns = PLAIN) -> np.ndarray:
    """Share of the absolute pull on negatives that each of their `tenths` gets: (10,), sum 1."""
    s, pull = negative_pulls(sim, objective, columns)
    return np.array([_share(pull, tenth) for tenth in tenths(s)])


def _share(pull: np.ndarray, part: np.ndarray) -> float:
    """The absolute pull on a part of the negatives, of that on all."""
    return float(np.abs(pull[part]).sum() / np.abs(pull).sum())


def hardest_share(sim: Tensor, objective: Any, columns: Columns = PLAIN) -> float:
    """Share of the absolute pull on negatives that the hardest tenth of them gets: 0 to 1."""
    return float(decile_shares(sim, objective, columns)[-1])


def pull_by_decile(sim: Tensor, objectives: Sequence[Any] = COMPARED) -> pd.DataFrame:
    """How the pull on negatives spreads over deciles of similarity, for several losses.

    Returns: Columns "name" (of the loss), "decile" (1 to 10, 10 = most similar), "similarity" (mean
    in the decile), "share" (of the absolute pull on all negatives, 0 to 1)."""
    s = _negatives(sim)
    deciles = {"decile": range(1, 11), "similarity": [s[tenth].mean() for tenth in tenths(s)]}
    tables = [
        pd.DataFrame({"name": name(named(o)), **deciles, "share": decile_shares(sim, o)})
        for o in objectives
    ]
    return pd.concat(tables, ignore_index=True)


def anchor_negatives(
    sim: Tensor, anchor: int, objectives: Sequence[Any] = tuple(OBJECTIVES)
) -> pd.DataFrame:
    """The negatives of one anchor with their pull under each of several objectives.

    Returns: N - 1 rows, most similar first: "negative" (the column of `sim`), "similarity", and a
    pull under the name of each objective."""
    row = {"negative": range(len(sim)), "similarity": sim[anchor].numpy()}
    for objective in objectives:
        weights = losses.gradient_weights(sim, objective)
        row[name(named(objective))] = len(sim) * weights[anchor].numpy()
    return _hardest_first(pd.DataFrame(row).drop(index=anchor))


def likely_false_negatives(
    sim: Tensor, labels: Sequence[str], quantile: float = 0.9
) -> pd.DataFrame:
    """Pairs of a batch that count as negatives and may well not be: alike, and of one label.

    A label is such as the article that a sentence comes from; a pair is alike if its similarity
    reaches this quantile (0 to 1) of all pairs.

    Returns: One row a pair, most similar first: "i" < "j" (rows of `sim`), "similarity" (the mean
    of s_ij and s_ji, which differ by dropout)."""
    i, j = np.triu_indices(len(sim), k=1)
    similarity = ((sim + sim.T) / 2).numpy()[i, j]
    titles = np.asarray(labels)
    found = (titles[i] == titles[j]) & (similarity >= np.quantile(similarity, quantile))
    return _hardest_first({"i": i[found], "j": j[found], "similarity": similarity[found]})


def false_negative_share(sim: Tensor, labels: Sequence[str], objective: Any) -> float:
    """Share of the absolute pull on all negatives that `likely_false_negatives` get: 0 to 1."""
    found = likely_false_negatives(sim, labels)
    pull = losses.gradient_weights(sim, objective).fill_diagonal_(0).abs()
    i, j = found["i"].tolist(), found["j"].tolist()
    return float((pull[i, j].sum() + pull[j, i].sum()) / pull.sum())


def effects(
    sim: Tensor, labels: Sequence[str], objective: Any, columns: Columns = PLAIN
) -> dict[str, float]:
    """How a loss acts on a batch with N labels, such as the article of each sentence, in numbers.

    Returns: effective_temperature: one over the slope of the logits, which is 1 / tau for InfoNCE
    and (2 s + m) / tau for modulated negatives, averaged over the negatives by their softmax
    weight. hardest: the share of the absolute pull on negatives that the hardest tenth gets;
    hardest_plain: the same under InfoNCE at that temperature. below: the share of negatives below
    their resting point, where the slope is below 0; towards: the share of the absolute pull that
    draws negatives closer. same_article: the share of the hardest tenth that is of its anchor's own
    label; same_article_pull: the share of the absolute pull on negatives that these take."""
    s, pull = negative_pulls(sim, objective, columns)
    logit, slope = _logits_and_slopes(sim, objective, columns)
    p, slope = _negatives(logit.softmax(dim=1)), _negatives(slope)
    titles = np.asarray(labels)
    same = _negatives(torch.from_numpy(titles[:, None] == titles))
    hardest = tenths(s)[-1]
    return {
        "effective_temperature": float(p.sum() / (p * slope).sum()),
        "hardest": _share(pull, hardest),
        "hardest_plain": hardest_share(sim, plain(objective)),
        "below": float((slope < 0).mean()),
        "towards": _share(pull, pull < 0),
        "same_article": float(same[hardest].mean()),
        "same_article_pull": _share(pull, same),
    }


def neighbourhood_purity(x: np.ndarray, labels: Sequence[str], k: int = 10) -> float:
    """Share of a point's k nearest neighbours that carry its own label, mean over points: 0 to 1.

    x: (n, D) float, rows of unit length for neighbours by cosine; n > k."""
    codes = np.unique(np.asarray(labels), return_inverse=True)[1]
    similarity = x @ x.T
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argpartition(-similarity, k, axis=1)[:, :k]
    return float((codes[nearest] == codes[:, None]).mean())


def below_resting_point(
    sim: Tensor, m_values: Sequence[float], temperature: float = 0.05
) -> pd.DataFrame:
    """How many negatives lie below s = -m/2, and how much of the pull draws them to the anchor.

    Returns: One row a value of m: "m", "resting_point", "below" (share of the negatives, 0 to 1),
    "pull_towards" (share of the absolute pull on negatives that raises their similarity)."""
    rows = []
    for m in m_values:
        s, pull = negative_pulls(sim, FocalInfoNCE(temperature, m))
        rows.append((m, -m / 2, float((s < -m / 2).mean()), _share(pull, pull < 0)))
    return pd.DataFrame(rows, columns=["m", "resting_point", "below", "pull_towards"])


def aligned_maps(
    embeddings: Mapping[str, np.ndarray], n_neighbors: int = 15, seed: int = 0
) -> dict[str, np.ndarray]:
    """UMAPs of the same sentences under several models, each sentence at a comparable place.

    All maps are laid out at once, by cosine (McInnes et al. 2018), with a term that holds each
    sentence near its place on the maps beside (`umap.AlignedUMAP`), so that what has moved was
    moved by the model. A single model gets a map of its own.

    embeddings: name of a model -> (n, D) float; row i is the same sentence in all, and models next
    to each other are held together. n_neighbors: neighbours by cosine that a map keeps together.
    Equal seeds give equal maps.

    Returns: Name -> (n, 2) float32. Distances of all pairs are held: 4 n^2 bytes a model."""
    distances = [_cosine_distances(x) for x in embeddings.values()]
    same = {i: i for i in range(len(distances[0]))}
    settings = {"n_neighbors": n_neighbors, "random_state": seed, "metric": "precomputed"}
    # What UMAP warns of is meant: a seed means one thread, and no map is inverted. Its compiler
    # sets torch's threads too, and on another number of them sums round otherwise: a run trained
    # after a map would differ in its last bits from one trained before.
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="n_jobs value|using precomputed metric")
        try:
            umap = _umap()
            if len(distances) == 1:
                placed = [umap.UMAP(**settings, n_jobs=1).fit_transform(distances[0])]
            else:
                mapper = umap.AlignedUMAP(**settings, transform_seed=seed)
                placed = mapper.fit_transform(distances, relations=[same] * (len(distances) - 1))
        finally:
            torch.set_num_threads(threads)
    return dict(zip(embeddings, map(np.asarray, placed), strict=True))


@cache
def _umap() -> Any:
    """UMAP, told to keep on disk what it compiles: later processes draw their first map at once."""
    import umap
    from numba.core.dispatcher import Dispatcher
    from umap import aligned_umap, layouts, umap_, utils

    with suppress(RuntimeError):  # there is no folder to keep it in
        for module in (aligned_umap, layouts, umap_, utils):
            for function in vars(module).values():
                if isinstance(function, Dispatcher) and function.__module__ == module.__name__:
                    function.enable_caching()
    return umap


def _cosine_distances(x: np.ndarray) -> np.ndarray:
    # UMAP's own way takes minutes where this takes a second: it compiles a search for neighbours,
    # or calls a Python function for each pair.
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    distances = np.clip(1 - x @ x.T, 0, None)
    np.fill_diagonal(distances, 0)
    return distances


def map_trustworthiness(x: np.ndarray, xy: np.ndarray, k: int = 10) -> float:
    """How far a map's neighbours are neighbours in the full space too: 0 to 1, higher is better.

    Each of the k nearest on the map that is none of the k nearest by cosine costs its rank beyond
    k (Venna & Kaski 2001). Memory grows with n squared: 1.5 GB for 8,000 points. x, xy: (n, D) and
    (n, 2) float, the embeddings and their map; n > 2 k."""
    from sklearn.manifold import trustworthiness

    return float(trustworthiness(x, xy, n_neighbors=k, metric="cosine"))
