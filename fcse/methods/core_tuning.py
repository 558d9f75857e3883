"""Core-tuning: solved rows count less, and pairs are mixed to be harder.

Source: Zhang et al., NeurIPS 2021 (arXiv 2102.06605), for supervised fine-tuning of image models,
and their code. The loss of a row is -(1 - p) log p, p the softmax probability of its positive.
Harder pairs are mixed from a row's own: a harder positive, lam v_i + (1 - lam) v_j, j the hardest
negative of anchor i, and a harder negative, lam' v_k + (1 - lam') u_i, k a random one. lam and lam'
are drawn from Beta(1, 1), lam' is at least 0.8. There are two ways to use them:

"paper", a reading of the paper, not its code: beside the loss stands the same with the harder
positive in the place of v_i; in both the row has its own harder negative more. Gradients flow
through all of it, and the temperature is the objective's.

"code", as their code has it: every unmixed vector of both views is an anchor, its other view the
one positive. All other unmixed vectors and all mixtures are in its denominator, the harder
positives too: their labels are of their own there, which makes them negatives. The unmixed vectors
are detached, so that the encoder learns by pushing mixtures away alone, and the temperature is
0.07. Their classification loss, which does the rest there, has no counterpart here.

Where the way of the code differs from their code:
- They mix the features of the encoder ahead of the projection. Here it is after the head.
- Their search for the harder positive takes the least similar of the class among all products, in
  which those of other classes are 0; with one positive it finds a wrong sentence or none. Here it
  is the other view.
- Their mean counts all columns, which divides the loss by their number. Here it is over anchors.
- Their random partner may be the vector itself or its positive. Here it is of another sentence.
In both ways they add the loss to a classification loss. There is none here."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fcse.errors import InputError
from fcse.methods import Comparison, Loss, Method, Moments, Start

if TYPE_CHECKING:
    from torch import Tensor

TEMPERATURE = 0.07
"""Of the authors' code."""

MIN_NEGATIVE_WEIGHT = 0.8
"""The least share of the drawn negative in a mixed one, as in the authors' code."""


@dataclass(frozen=True)
class CoreTuning(Method):
    """Settings of Core-tuning (Zhang et al. 2021)."""

    focal_weight: bool = True
    """Weigh a row's loss by 1 - its positive's probability."""
    mixing: bool = True
    """Add harder positives and negatives, mixed from a row's own."""
    way: Literal["paper", "code"] = "paper"
    """How mixtures are used: a reading of the paper, or as the authors' code has it."""

    label = "Core-tuning"
    switches = ("focal_weight", "mixing")

    def __post_init__(self) -> None:
        if self.way not in ("paper", "code"):
            raise InputError(f"unknown core_tuning.way {self.way!r}: choose from paper, code")
        if self.way == "code" and self.focal_weight and not self.mixing:
            raise InputError(
                "core_tuning.way code learns from mixtures alone: set core_tuning.mixing to true"
            )

    @property
    def by_matrix(self) -> bool:
        """The focal weight alone is of a row's similarities; mixing needs vectors."""
        return not self.mixing

    def check(self, config: Any) -> None:
        """Raise InputError where another method adds negatives for all rows."""
        others = {"sscl": "layers", "cards": "k", "iftcl": "queue", "debcse": "negatives"}
        for other in config.methods:
            setting = others.get(other.key)
            if self.mixing and setting and getattr(other, setting) != 0:
                off = "false" if setting == "negatives" else "0"
                raise InputError(
                    f"core_tuning.mixing takes each row's own negatives, {other.key}.{setting} "
                    f"adds some for all rows: set core_tuning.mixing to false, or "
                    f"{other.key}.{setting} to {off}"
                )

    def begin(self, start: Start) -> Moments:
        """Raise InputError where several processes share a batch that is to be mixed."""
        from fcse import processes

        if self.mixing and processes.world().num_processes > 1:
            raise InputError(
                "core_tuning.mixing needs a batch in one process: set core_tuning.mixing to false"
            )
        return _Harder(self, start.config.seed)


class _Harder(Moments):
    def __init__(self, settings: CoreTuning, seed: int) -> None:
        self.settings, self.seed = settings, seed

    def objective(self, step: int, objective: Any) -> Any:
        if self.settings.way == "code" and hasattr(objective, "temperature"):
            objective = replace(objective, temperature=TEMPERATURE)
        return FocalWeight(objective) if self.settings.focal_weight else objective

    def loss(self, value: Loss, compared: Comparison) -> "Tensor":
        from fcse.losses import Own

        if not self.settings.mixing:
            return value(compared)
        if self.settings.way == "code":
            size = 2 * compared.batch.size
            return value(among_mixtures(compared, *draws(self.seed, compared.batch.step, size)))
        drawn = draws(self.seed, compared.batch.step, len(compared.u))
        positive, negative = mixed_pairs(compared.u, compared.v, *drawn, compared.numbers())
        own_of = compared.of[drawn[2].to(compared.of.device)]
        usual = replace(compared, own=Own(negative), own_of=own_of)
        harder = replace(compared, own=Own(negative, positive=positive), own_of=own_of)
        return (value(usual) + value(harder)) / 2


@dataclass(frozen=True)
class FocalWeight:
    """Another objective whose row counts 1 - p, p the softmax probability of its positive.

    Gradients flow through the weight, as in the authors' code. Where the other objective weighs
    its rows, both weights count."""

    objective: Any
    """Where logits and slopes come from."""

    def __init__(self, objective: Any, **changes: Any) -> None:
        """`changes`, as `replace` hands them on, are those of the other objective."""
        objective = replace(objective, **changes) if changes else objective
        object.__setattr__(self, "objective", objective)

    def logits(self, sim: "Tensor", positives: "Tensor") -> "Tensor":
        """Those of the other objective, (N, M)."""
        return self.objective.logits(sim, positives)

    def row_weight(self, log_p: "Tensor") -> "Tensor":
        """1 - p of each row, (N,), from its log p."""
        theirs = getattr(self.objective, "row_weight", None)
        return -log_p.expm1() * (theirs(log_p) if theirs else 1)

    def __getattr__(self, name: str) -> Any:
        if name in ("slopes", "temperature"):  # there where the other objective has them
            return getattr(self.objective, name)
        raise AttributeError(name)


def draws(seed: int, step: int, size: int) -> "tuple[Tensor, Tensor, Tensor]":
    """The shares lam and lam' of a step's rows, and a random negative of each; (size,) each.

    Float32 from Beta(1, 1), and int64 columns, never a row's own; from seed and step alone."""
    import torch

    # The 3 keeps this stream apart from those of CARDS.
    generator = np.random.default_rng((3, seed, step))
    positive, negative = torch.from_numpy(generator.beta(1, 1, (2, size))).float()
    others = generator.integers(1, size, size)
    return positive, negative, torch.from_numpy((np.arange(size) + others) % size)


def mixed_pairs(
    u: "Tensor",
    v: "Tensor",
    positive_weight: "Tensor",
    negative_weight: "Tensor",
    negative_columns: "Tensor",
    sentence_ids: "Tensor | None" = None,
) -> "tuple[Tensor, Tensor]":
    """A harder positive and a harder negative for each anchor, with gradients through both parts.

    Args:
        u: (N, D) float, the anchors.
        v: (M, D) float, M >= N, as in `losses.chunked_loss`.
        positive_weight, negative_weight: (N,) float in [0, 1], the shares lam of v_i and lam' of
            v_k; below `MIN_NEGATIVE_WEIGHT` lam' is raised to it.
        negative_columns: (N,) int64, the column k of each anchor.
        sentence_ids: (M,) or (G, M) int64, as in `losses.Columns`: a false negative is never the
            hardest. An anchor without any true negative keeps v_i.

    Returns: Unit vectors, (N, D) float32 (float64 for float64 inputs): the positives and the
    negatives. ValueError: a tensor has another shape."""
    import torch

    from fcse.losses import repeats, similarity_matrix, unit_rows

    with torch.autocast(u.device.type, enabled=False):
        sim = similarity_matrix(u.detach(), v.detach())
        if not 0 < len(u) <= len(v):
            raise ValueError(f"v must have a row for each of u's, got {len(v)} for {len(u)}")
        u, v = unit_rows(u), unit_rows(v)
    if any(x.shape != u.shape[:1] for x in (positive_weight, negative_weight, negative_columns)):
        raise ValueError(f"weights and columns must be ({len(u)},), one for each anchor")
    if sentence_ids is not None:
        sim = sim.masked_fill(repeats(sentence_ids, *sim.shape), -torch.inf)
    # No cosine is as low as -2: the positive is taken where no true negative is left.
    sim.diagonal().fill_(-2)
    lam = positive_weight.to(u)[:, None]
    positive = unit_rows(lam * v[: len(u)] + (1 - lam) * v[sim.argmax(dim=1)])
    lam = negative_weight.clamp_min(MIN_NEGATIVE_WEIGHT).to(u)[:, None]
    return positive, unit_rows(lam * v[negative_columns.to(v.device)] + (1 - lam) * u)


def among_mixtures(
    compared: Comparison, positive_weight: "Tensor", negative_weight: "Tensor", partners: "Tensor"
) -> Comparison:
    """What the authors' code compares: 2 N detached vectors with each other and with 4 N mixtures.

    Args:
        compared: N anchors and their N other views, in one process.
        positive_weight, negative_weight: (2 N,) float, lam and lam' of each vector of both views;
            below `MIN_NEGATIVE_WEIGHT` lam' is raised to it.
        partners: (2 N,) int64, the vector that each is mixed with; the next one, where that is of
            its own sentence."""
    import torch

    from fcse.losses import similarity_matrix

    n = len(compared.u)
    vectors = torch.cat([compared.u, compared.v[:n]])
    both, device = compared.ids[:n].repeat(2), vectors.device
    other_view = torch.arange(2 * n, device=device).roll(n)
    partners = partners.to(device)
    partners = torch.where(partners == other_view, (partners + 1) % (2 * n), partners)
    with torch.autocast(device.type, enabled=False):
        sim = similarity_matrix(vectors.detach(), vectors.detach())
    hardest = sim.masked_fill(both[:, None] == both, -2).argmax(dim=1)
    lam = negative_weight.to(vectors).clamp_min(MIN_NEGATIVE_WEIGHT)[:, None]
    harder_negative = lam * vectors[partners] + (1 - lam) * vectors
    lam = positive_weight.to(vectors)[:, None]
    harder_positive = lam * vectors[other_view] + (1 - lam) * vectors[hardest]
    anchors = replace(
        compared,
        u=vectors.detach(),
        v=vectors.detach().roll(n, 0),
        of=compared.of[:n].repeat(2),
        ids=both,
        always=compared.always[:n].repeat(2),
    )
    return anchors.more(torch.cat([harder_negative, harder_positive]))
