"""DebCSE after the abstract: pairs are drawn so that the words they share do not decide them.

Source: the abstract of Miao, Du and Zhang, CIKM 2023 (arXiv 2309.07396): rules that make pairs are
biased, so positives and negatives are drawn by inverse propensities from surface and semantic
similarity. Neither formulas nor code could be had: all formulas and values are this kit's own.

Candidates of a sentence are its k nearest of the corpus by a teacher, and four edits of it, as of
IFTCL. a is the share of words and pairs of words that both have (Jaccard), b the teacher's cosine,
at least 0. Positives are drawn by b^gamma / e+ among those with b >= positive_from, for the second
view; negatives by (1 - b)^gamma / e- among those with b <= negative_to, as further columns. e+ is
the share of all candidates with an a as low or lower, e- as high or higher: sharing few words
favours a positive, many a negative. Both are counted in bins over a thousand sentences; 1 / e is
cut at a quantile. Where none passes, the second view is the sentence's own and no column joins.

Beware: the packaged text holds few paraphrases. A neighbour above `positive_from` often says
another thing of the same subject, and most positives are edits. The packaged teacher saw supervised
pairs in its own training. tf-idf did not, but finds most neighbours alike: raise both thresholds
with it. A positive that is itself in the batch is among the negatives of that row."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from fcse.data import versions
from fcse.methods import Batch, Brought, Comparison, Loss, Method, Moments, Sentences, Start
from fcse.methods.adap_acse import TERMS, teacher_of
from fcse.methods.cards import found_once, row_numbers
from fcse.methods.iftcl import changed_words
from fcse.objectives import require, require_share

if TYPE_CHECKING:
    from torch import Tensor

BINS, CUT, EDITS, CHANGED = 20, 0.95, 4, 0.32
"""Bins of a; quantile at which 1 / e is cut; edits a sentence, and most of their words changed."""
EDGES = np.arange(1, BINS) / BINS


@dataclass(frozen=True)
class DebCSE(Method):
    """Settings of DebCSE after the abstract (Miao et al. 2023); the values are this kit's."""

    positives: bool = True
    """Draw a neighbour or an edit for the second view."""
    negatives: bool = True
    """Draw a further negative."""
    weighting: bool = True
    """Draw by inverse propensities; else by the teacher alone."""
    k: int = 32
    """Nearest sentences of the corpus among the candidates, >= 1."""
    positive_from: float = 0.75
    """Least similarity of a positive by the teacher, 0 to 1."""
    negative_to: float = 0.5
    """Highest similarity of a negative by the teacher, 0 to 1."""
    gamma: float = 1.0
    """How much the teacher's similarity counts among those that pass, >= 0."""
    teacher: str = "minilm"
    """An encoder's mean readout: minilm, a model folder or a hub name; or tf-idf of the corpus."""

    label = "DebCSE after the abstract"
    switches = ("positives", "negatives")

    def __post_init__(self) -> None:
        require("debcse.k", self.k, 1)
        require("debcse.gamma", self.gamma)
        require_share("debcse.positive_from", self.positive_from)
        require_share("debcse.negative_to", self.negative_to)

    def begin(self, start: Start) -> Moments:
        """Search the corpus with the teacher; InputError: no such teacher, or k is too large."""
        return _Drawing(self, start)

    def files(self) -> tuple[str, ...]:
        """The teacher, where it is a model."""
        return () if self.teacher == TERMS else (self.teacher,)


class _Drawing(Moments):
    def __init__(self, settings: DebCSE, start: Start) -> None:
        import torch

        self.settings, self.start, self.counts = settings, start, torch.zeros(3)
        self.on = np.array([[settings.positives], [settings.negatives]])
        self.teacher, name = teacher_of(settings.teacher, start)
        decides = [start.corpus.key, name, settings.k, "cosines", versions()]
        self.near = found_once(lambda: _search(start, self.teacher, settings.k), decides)
        self.inverse = np.ones((2, BINS))
        if settings.weighting:
            rows = np.unique(np.linspace(0, len(start.corpus) - 1, 1000).astype(np.int64))
            texts = self._candidates(rows, np.random.default_rng((5, start.config.seed, 0)))
            self.inverse = inverse_propensities(overlaps(texts))

    def _candidates(self, rows: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Texts of each row's neighbours, its edits, and last its own, (n, k + EDITS + 1)."""
        near, _ = self.start.corpus.batch(self.near["row"][rows].ravel())
        own = [
            [*(changed_words(x, "any", CHANGED, generator) for _ in range(EDITS)), x]
            for x in self.start.corpus.batch(rows)[0]
        ]
        return np.hstack([np.array(near, object).reshape(len(rows), -1), np.array(own, object)])

    def bring(self, batch: Batch) -> Brought:
        size, k, encoder = batch.size, self.settings.k, self.start.encoder
        # The 5 keeps this stream apart from those of other methods.
        generator = np.random.default_rng((5, self.start.config.seed, batch.step))
        rows = batch.sentences.rows[:size].astype(np.int64)
        texts, near = self._candidates(rows, generator), self.near[rows]
        own = self.teacher(texts[:, k:].ravel().tolist()).reshape(size, EDITS + 1, -1)
        b = np.hstack([near["cosine"], _cosines(own[:, -1], own[:, :-1])])
        w = self.on[:, :, None] * weights(overlaps(texts), b, self.inverse, self.settings)
        places = drawn(w, generator.random((2, size)))
        self.found = places >= 0
        self.sizes = w.sum(2) ** 2 / np.maximum((w**2).sum(2), 1e-300)
        row = np.arange(size)
        chosen = texts[row, places].tolist()  # at -1 their own
        second, ids = (encoder.tokenize(x, self.start.config.max_length) for x in chosen)
        rows = np.column_stack([near["row"], np.full((size, EDITS), -1), rows])[row, places[1]]
        further = Sentences(rows, chosen[1], ids)
        positives, negatives = self.found
        return Brought(second if positives.any() else None, further if negatives.any() else None)

    def numbers(self, batch: Batch) -> "Tensor | None":
        return None if self.start.config.mask_duplicates else row_numbers(batch)  # as in CARDS

    def loss(self, value: Loss, compared: Comparison) -> "Tensor":
        if DebCSE.key in compared.brought:
            of = compared.place()
            found = of.new_tensor(self.found[1]).bool()[of]
            vectors = compared.brought[DebCSE.key][found]
            compared = compared.more(vectors, compared.place(DebCSE.key)[found])
        return value(compared)

    def counted(self, batch: Batch) -> dict[str, float]:
        found = self.found.mean(1)
        self.counts += self.counts.new_tensor([*found, 1])
        sizes = self.sizes.sum(1) / self.found.sum(1).clip(1)
        names = ("positives", "negatives", "effective_positives", "effective_negatives")
        return dict(zip(names, [*found.tolist(), *sizes.tolist()], strict=True))

    def remark(self) -> str:
        few = self.on[:, 0] & (self.counts[:2] < 0.05 * self.counts[2]).numpy()
        said = "debcse drew next to no " + " and no ".join(np.array(DebCSE.switches)[few])
        way_out = ": lower debcse.positive_from, raise debcse.negative_to"
        return said + way_out if few.any() else ""

    def state(self) -> "dict[str, Tensor]":
        return {"counts": self.counts}

    def restore(self, state: "dict[str, Tensor]") -> None:
        self.counts = state["counts"]


def _search(start: Start, teacher: Callable, k: int) -> np.ndarray:
    """Rows and cosines of the k nearest, (n, k) of two fields."""
    from fcse.encoder.nearest import nearest

    corpus = start.corpus
    parts = np.array_split(np.arange(len(corpus)), len(corpus) // 1024 + 1)
    x = np.concatenate([teacher(corpus.batch(p)[0]).astype(np.float16) for p in parts])
    found = np.empty((len(x), k), [("row", np.int32), ("cosine", np.float32)])
    found["row"] = nearest(x, k, corpus.ids(), start.encoder.device)
    for p in parts:
        found["cosine"][p] = _cosines(x[p], x[found["row"][p]])
    return found


def _cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    import torch

    them, others = torch.from_numpy(x[:, None]).float(), torch.from_numpy(y).float()
    return torch.cosine_similarity(them, others, dim=2).clamp(0, 1).numpy()


def overlaps(texts: np.ndarray) -> np.ndarray:
    """a of the last of C + 1 texts with the others, (n, C) in [0, 1]; of words in small letters."""

    def parts(text: str) -> set:
        words = re.findall(r"\w+", text.lower())
        return {*words, *pairwise(words)}

    rows = ([parts(x) for x in row] for row in texts)
    return np.array([[len(x & y) / max(1, len(x | y)) for y in ys] for *ys, x in rows])


def inverse_propensities(a: np.ndarray, cut: float = CUT) -> np.ndarray:
    """1 / e+ and 1 / e- in each bin of a, (2, BINS), from the a of all candidates, (n, C).

    Each bin counts once more than it is found. The quantile `cut` over candidates is the most."""
    bins = np.digitize(a.ravel(), EDGES)
    share = (np.bincount(bins, minlength=BINS) + 1) / (len(bins) + BINS)
    inverse = 1 / np.stack([share.cumsum(), share[::-1].cumsum()[::-1]])
    return np.minimum(inverse, np.quantile(inverse[:, bins], cut, axis=1, keepdims=True))


def weights(a: np.ndarray, b: np.ndarray, inverse: np.ndarray, settings: DebCSE) -> np.ndarray:
    """What C candidates each are drawn by as positives and as negatives, (2, n, C).

    a, b: (n, C) in [0, 1]. inverse: (2, BINS), from `inverse_propensities`."""
    near = (b >= settings.positive_from) * b**settings.gamma
    far = (b <= settings.negative_to) * (1 - b) ** settings.gamma
    return np.stack([near, far]) * inverse[:, np.digitize(a, EDGES)]


def drawn(weights: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """A place of (..., C) weights by these, (...); -1 where all are 0. uniform: (...), below 1."""
    sums = weights.cumsum(-1)
    places = (sums > uniform[..., None] * sums[..., -1:]).argmax(-1)
    return np.where(sums[..., -1] > 0, places, -1)
