"""IFTCL after the abstract: changed words keep their distance, and earlier views join as negatives.

Source: the abstract of Xiao, Li and Chen, arXiv 2307.10932: changed words change the meaning, so
that a pair has an innate margin, which a Twins Loss keeps; a hippocampus queue uses negatives
again. Neither formulas nor code could be had: all formulas and values are this kit's own.

Twins: the identical twin of a sentence is its other dropout view v_i. The fraternal twin w_i has
some words repeated, left out or swapped with the next one, and is embedded once. Their innate
margin is delta_i = 1 - cos of both under the encoder of the start, without dropout, behind its
head. Beside the loss stands twins * mean_i max(0, delta_i - d_i)^2: closer than at the start is too
close. d_i is u_i.v_i - u_i.w_i, what the change of words adds to dropout, or with `margin` innate
1 - u_i.w_i as it is. That has dropout in it, and with the packaged encoder it was never near
delta_i. w_i is in no other term. A step has one more pass that learns, two that do not.

Queue: the views v of the last batches are further columns, without gradients. A sentence that
comes back while it is in the queue is left out for itself, as any repeat is."""

import copy
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from fcse.errors import InputError
from fcse.methods import Batch, Brought, Comparison, Loss, Method, Moments, Sentences, Start
from fcse.objectives import require, require_share

if TYPE_CHECKING:
    from torch import Tensor

Change = Literal["any", "repetition", "deletion", "swap"]
Margin = Literal["between", "innate"]


@dataclass(frozen=True)
class IFTCL(Method):
    """Settings of IFTCL after the abstract (Xiao et al. 2023); the values are this kit's."""

    twins: float = 10.0
    """Weight of the term that keeps a changed sentence at its distance, >= 0; 0 turns it off."""
    queue: int = 2
    """Batches whose second views stay as negatives, >= 0; 0 keeps none."""
    change: Change = "any"
    """What happens to words: repetition, deletion, swap with the next one, or any of these."""
    share: float = 0.32
    """Most words that change, 0 to 1 of a sentence; at least one does."""
    margin: Margin = "between"
    """What is kept at the innate margin: the gap between both twins, or innate: 1 - cos itself."""

    label = "IFTCL after the abstract"
    switches = ("twins", "queue")

    def __post_init__(self) -> None:
        require("iftcl.twins", self.twins)
        require("iftcl.queue", self.queue)
        require_share("iftcl.share", self.share)
        for name, kind in (("change", Change), ("margin", Margin)):
            if (value := getattr(self, name)) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise InputError(f"unknown iftcl.{name} {value!r}: choose from {choices}")

    def begin(self, start: Start) -> Moments:
        """Copy the encoder; InputError: the queue holds more than the corpus has sentences."""
        held, most = self.queue * start.config.batch_size, len(start.corpus)
        if held > most:
            said = f"iftcl.queue of {self.queue} batches holds {held} sentences, more than the"
            raise InputError(f"{said} {most} of the corpus: lower it, or batch_size")
        return _Twins(self, start)


class _Twins(Moments):
    def __init__(self, settings: IFTCL, start: Start) -> None:
        import torch

        self.settings, self.start = settings, start
        self.counts = torch.zeros(2, device=start.encoder.device)  # too close, and all
        # A run that goes on takes its weights later: these are those of the start in any case.
        self.first = copy.deepcopy(start.encoder).eval().requires_grad_(False)
        self.held: deque[tuple[Tensor, Tensor]] = deque(maxlen=settings.queue)

    def bring(self, batch: Batch) -> Brought | None:
        settings, config = self.settings, self.start.config
        if not settings.twins:
            return None
        # The 4 keeps this stream apart from those of other methods.
        generator = np.random.default_rng((4, config.seed, batch.step))
        texts = batch.sentences.texts[: batch.size]
        texts = [changed_words(x, settings.change, settings.share, generator) for x in texts]
        token_ids = self.start.encoder.tokenize(texts, config.max_length)
        return Brought(further=Sentences(-np.ones(batch.size), texts, token_ids))

    def loss(self, value: Loss, compared: Comparison) -> "Tensor":
        for vectors, ids in self.held:
            # Without masks a batch's numbers are places, which mean nothing in another batch.
            known = ids if self.start.config.mask_duplicates else None
            compared = compared.more(vectors.to(compared.v), ids=known)
        return value(compared)

    def beside(self, compared: Comparison) -> "Tensor | None":
        from fcse import processes

        batch, n = compared.batch, len(compared.u)
        # In the order of the batch, which is the same in all processes.
        self.fresh = compared.v.detach()[compared.of.argsort()], batch.ids[: batch.size]
        if not self.settings.twins:
            return None
        place = batch.places[IFTCL.key]
        changed = processes.share(batch.sentences.token_ids[place : place + batch.size])
        margin = distances(*self.first(compared.token_ids, changed))
        v = compared.v[:n] if self.settings.margin == "between" else None
        missing = twins(compared.u, compared.brought[IFTCL.key][:n], margin, v)
        self.counts += self.counts.new_tensor([0, n])
        self.counts[0] += (missing.detach() > 0).sum()
        return self.settings.twins * missing.square().mean()

    def after_step(self, step: int) -> None:
        self.held.append(self.fresh)

    def remark(self) -> str:
        close, n = self.counts.tolist()
        said = f"iftcl's twins were too close in {close:.0f} of {n:.0f} pairs, next to none"
        return said if close < 0.01 * n else ""

    def state(self) -> "dict[str, Tensor]":
        held = {f"{i}/{j}": x for i, pair in enumerate(self.held) for j, x in enumerate(pair)}
        return {"counts": self.counts} | held

    def restore(self, state: "dict[str, Tensor]") -> None:
        self.counts = state["counts"].to(self.counts.device)
        self.held.extend((state[f"{i}/0"], state[f"{i}/1"]) for i in range(len(state) // 2))


def twins(u: "Tensor", w: "Tensor", margin: "Tensor", v: "Tensor | None" = None) -> "Tensor":
    """max(0, margin_i - d_i), (n,), d_i the gap between both twins, or 1 - u_i.w_i without v.

    u, w, v: (n, D) float, of any length. margin: (n,)."""
    reached = distances(u, w) - (0 if v is None else distances(u, v))
    return (margin - reached).clamp_min(0)


def distances(u: "Tensor", w: "Tensor") -> "Tensor":
    """1 - cos of n rows with as many others, (n,), in float32 at least."""
    from fcse.losses import unit_rows

    return 1 - (unit_rows(u) * unit_rows(w)).sum(dim=1)


def kept(innate: np.ndarray, realised: np.ndarray) -> tuple[float, float]:
    """Slope of realised over innate margins, (n,) float each, by least squares; their correlation.

    Both are 1 where a trained encoder has kept them all."""
    (var, both), (_, theirs) = np.cov(innate, realised)
    return float(both / var), float(both / np.sqrt(var * theirs))


def changed_words(
    sentence: str, change: Change, share: float, generator: np.random.Generator
) -> str:
    """The sentence with some words said twice, left out, or swapped with the next one.

    How many of those that spaces part is drawn evenly from 1 to their share, rounded down; a lone
    word is not left out or swapped."""
    words = sentence.split()
    kind = generator.choice(get_args(Change)[1:]) if change == "any" else change
    most = len(words) - (kind != "repetition")
    count = min(most, int(generator.integers(1, max(2, int(share * len(words)) + 1))))
    places = generator.choice(len(words) - (kind == "swap"), count, replace=False)
    for place in sorted(places.tolist(), reverse=True):
        word = words[place] if kind == "repetition" else words.pop(place)
        if kind != "deletion":
            words.insert(place + 1, word)
    return " ".join(words)
