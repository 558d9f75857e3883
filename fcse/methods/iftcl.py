"""IFTCL after the abstract: changed words keep their distance, and earlier views join as negatives.

Source: the abstract of Xiao, Li and Chen, arXiv 2307.10932; neither their formulas nor any code
could be had. It says that changed words change the meaning, so that the pair has an innate margin,
which a Twins Loss keeps in training, and that a hippocampus queue uses stored negatives again. All
formulas and values here are this kit's own.

Twins: the identical twin of a sentence is its other dropout view v_i. The fraternal twin w_i has
some words repeated, left out or swapped with the next one, and is embedded once. Their innate
margin is delta_i = 1 - cos of both under the encoder as it was at the start, without dropout,
behind its head. Beside the loss stands twins * mean_i max(0, delta_i - (1 - u_i.w_i))^2: closer
than at the start is too close. With `margin` it is max(0, margin - (u_i.v_i - u_i.w_i))^2, a gap
between both twins. w_i is in no other term. The price: one more pass that learns, two that do not.

Queue: the views v of the last batches are further columns, without gradients. A sentence that
comes back while it is in the queue is left out for itself, as any repeat is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fcse.errors import InputError
from fcse.methods import Batch, Brought, Comparison, Loss, Method, Moments, Sentences, Start
from fcse.objectives import require, require_share

if TYPE_CHECKING:
    from torch import Tensor

Change = Literal["any", "repetition", "deletion", "swap"]


@dataclass(frozen=True)
class IFTCL(Method):
    """Settings of IFTCL after the abstract (Xiao et al. 2023); the values are this kit's."""

    twins: float = 1.0
    """Weight of the term that keeps a changed sentence at its distance, >= 0; 0 turns it off."""
    queue: int = 2
    """Batches whose second views stay as negatives, >= 0; 0 keeps none."""
    change: Change = "any"
    """What happens to words: repetition, deletion, swap with the next one, or any of these."""
    share: float = 0.32
    """Most words that change, 0 to 1 of a sentence; at least one does."""
    margin: float | None = None
    """Gap to keep between identical and fraternal twin, 0 to 2; else each pair's innate margin."""

    label = "IFTCL after the abstract"
    switches = ("twins", "queue")

    def __post_init__(self) -> None:
        require("iftcl.twins", self.twins)
        require("iftcl.queue", self.queue)
        require_share("iftcl.share", self.share)
        if self.change not in get_args(Change):
            choices = ", ".join(get_args(Change))
            raise InputError(f"unknown iftcl.change {self.change!r}: choose from {choices}")
        if self.margin is not None and not 0 <= self.margin <= 2:
            raise InputError(f"iftcl.margin must lie between 0 and 2, got {self.margin}")

    def begin(self, start: Start) -> Moments:
        """Copy the encoder; InputError: the queue holds more than the corpus has sentences."""
        held = self.queue * start.config.batch_size
        if held > len(start.corpus):
            raise InputError(
                f"iftcl.queue of {self.queue} batches holds {held} sentences, more than the "
                f"{len(start.corpus)} of the corpus: lower it, or batch_size"
            )
        return _Twins(self, start)


class _Twins(Moments):
    def __init__(self, settings: IFTCL, start: Start) -> None:
        import copy

        import torch

        encoder = start.encoder
        self.settings, self.config, self.tokenize = settings, start.config, encoder.tokenize
        # A run that goes on takes its weights later: these are those of the start in any case.
        self.first = copy.deepcopy(encoder).eval() if settings.twins else None
        self.vectors = torch.empty(0, encoder.dimension, device=encoder.device)
        self.ids = torch.empty(0, dtype=torch.int64)
        self.fresh = self.vectors, self.ids

    def bring(self, batch: Batch) -> Brought | None:
        if not self.settings.twins:
            return None
        # The 4 keeps this stream apart from those of other methods.
        generator = np.random.default_rng((4, self.config.seed, batch.step))
        settings, texts = self.settings, batch.sentences.texts[: batch.size]
        changed = [changed_words(x, settings.change, settings.share, generator) for x in texts]
        token_ids = self.tokenize(changed, self.config.max_length)
        return Brought(further=Sentences(-np.ones(batch.size), changed, token_ids))

    def loss(self, value: Loss, compared: Comparison) -> "Tensor":
        if not len(self.vectors):
            return value(compared)
        # Without masks a batch's numbers are places, of which those of other batches know nothing.
        ids = self.ids if self.config.mask_duplicates else None
        return value(compared.more(self.vectors, ids=ids))

    def beside(self, compared: Comparison) -> "Tensor | None":
        from fcse import processes

        batch, n = compared.batch, len(compared.u)
        # In the order of the batch, which is the same in all processes.
        order = compared.of[: batch.size].argsort()
        self.fresh = compared.v.detach()[order], batch.ids[: batch.size]
        if not self.settings.twins:
            return None
        w, margin = compared.brought[IFTCL.key][:n], self.settings.margin
        if margin is not None:
            return self.settings.twins * twins(compared.u, w, margin, compared.v[:n])
        place = batch.places[IFTCL.key]
        changed = processes.share(batch.sentences.token_ids[place : place + batch.size])
        margins = innate(self.first, compared.token_ids, changed)
        return self.settings.twins * twins(compared.u, w, margins)

    def after_step(self, step: int) -> None:
        import torch

        if held := self.settings.queue * self.config.batch_size:
            vectors, ids = self.fresh
            self.vectors = torch.cat([self.vectors.to(vectors), vectors])[-held:]
            self.ids = torch.cat([self.ids, ids])[-held:]

    def state(self) -> "dict[str, Tensor]":
        return {"vectors": self.vectors, "ids": self.ids} if self.settings.queue else {}

    def restore(self, state: "dict[str, Tensor]") -> None:
        if state:
            self.vectors, self.ids = state["vectors"].to(self.vectors.device), state["ids"]


def twins(u: "Tensor", w: "Tensor", margin: Any, v: "Tensor | None" = None) -> "Tensor":
    """mean_i max(0, margin_i - d_i)^2, (), with d_i = 1 - u_i.w_i, or u_i.v_i - u_i.w_i with v.

    u, w, v: (n, D) float, of any length; float32 at least within. margin: (n,) or a number."""
    from fcse.losses import unit_rows

    u, w = unit_rows(u), unit_rows(w)
    nearest = 1.0 if v is None else (u * unit_rows(v)).sum(dim=1)
    return (margin - (nearest - (u * w).sum(dim=1))).clamp_min(0).square().mean()


def innate(
    encoder: Any, token_ids: Sequence[Sequence[int]], changed: Sequence[Sequence[int]]
) -> "Tensor":
    """1 - cos of n sentences and as many others behind the head, (n,) float, without a gradient."""
    import torch

    from fcse.losses import unit_rows

    with torch.no_grad():
        u, w = map(unit_rows, encoder(token_ids, changed))
        return 1 - (u * w).sum(dim=1)


def kept(innate: np.ndarray, realised: np.ndarray) -> tuple[float, float]:
    """How distances of n pairs after training, (n,) float, follow those of the start, (n,) float.

    Returns: the slope of realised over innate by least squares, and Pearson's correlation. Both are
    1 where each pair kept its margin; NaN where innate does not vary."""
    x, y = innate - np.mean(innate), realised - np.mean(realised)
    with np.errstate(invalid="ignore"):
        return float(x @ y / (x @ x)), float(x @ y / np.sqrt((x @ x) * (y @ y)))


def changed_words(
    sentence: str, change: Change, share: float, generator: np.random.Generator
) -> str:
    """The sentence with some words said twice, left out, or swapped with the next one.

    How many is drawn evenly from 1 to a share of its words, rounded down.

    Args:
        sentence: its words are what white space parts; a lone one is not left out or swapped.
        change: which of these; any draws one for the sentence.
        share: 0 to 1."""
    words = sentence.split()
    kind = generator.choice(get_args(Change)[1:]) if change == "any" else change
    most = len(words) - (kind != "repetition")
    count = min(most, int(generator.integers(1, max(2, int(share * len(words)) + 1))))
    places = generator.choice(len(words) - (kind == "swap"), count, replace=False)
    for place in sorted(places.tolist(), reverse=True):
        word = words[place]
        if kind == "repetition":
            words.insert(place, word)
        else:
            del words[place]
        if kind == "swap":
            words.insert(place + 1, word)
    return " ".join(words)
