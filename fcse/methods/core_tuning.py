"""Core-tuning: solved rows count less, and pairs are mixed to be harder.

Source: Zhang et al., NeurIPS 2021 (arXiv 2102.06605), for supervised fine-tuning of image models.
The loss of a row is -(1 - p) log p, p the softmax probability of its positive. Beside it stands
the loss with a harder positive, lam v_i + (1 - lam) v_j, j the hardest negative of anchor i; in
both the row has a harder negative more, lam' v_k + (1 - lam') u_i, k a random negative. lam and
lam' are drawn from Beta(1, 1), lam' is at least 0.8.

Where this differs from the authors:
- Their code mixes the features of the encoder, ahead of the projection; this mixes unit embeddings.
- Mixed vectors are candidates of their own anchor only. There they are further anchors of a
  supervised contrastive loss, positives of one sentence with labels of their own.
- They detach the unmixed features: the encoder learns through mixtures alone. Here gradients flow
  through both parts of a mixture, and through what is not mixed.
- A draw that is a false negative of its anchor is left out. They keep it.
- Their temperature is 0.07, here it is that of the run's objective.
- They add the loss to a classification loss. There is none here."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fcse.errors import InputError
from fcse.methods import Comparison, Loss, Method, Moments, Start

if TYPE_CHECKING:
    from torch import Tensor

MIN_NEGATIVE_WEIGHT = 0.8
"""The least share of the drawn negative in a mixed one, as in the authors' code."""


@dataclass(frozen=True)
class CoreTuning(Method):
    """Settings of Core-tuning (Zhang et al. 2021)."""

    focal_weight: bool = True
    """Weigh a row's loss by 1 - its positive's probability."""
    mixing: bool = True
    """Add harder positives and negatives, mixed from a row's own."""

    label = "Core-tuning"
    switches = ("focal_weight", "mixing")

    @property
    def by_matrix(self) -> bool:
        """The focal weight alone is of a row's similarities; mixing needs vectors."""
        return not self.mixing

    def check(self, config: Any) -> None:
        """Raise InputError where another method adds negatives for all rows."""
        others = {"sscl": "layers", "cards": "neighbours"}
        for other in config.methods:
            setting = others.get(other.key)
            if self.mixing and setting and getattr(other, setting):
                raise InputError(
                    f"core_tuning.mixing takes each row's own negatives, {other.key}.{setting} "
                    f"adds some for all rows: set core_tuning.mixing to false, or "
                    f"{other.key}.{setting} to 0"
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
        return FocalWeight(objective) if self.settings.focal_weight else objective

    def loss(self, value: Loss, compared: Comparison) -> "Tensor":
        from fcse.losses import Own

        if not self.settings.mixing:
            return value(compared)
        lam, other, columns = draws(self.seed, compared.batch.step, len(compared.u))
        positive, negative = mixed_pairs(
            compared.u, compared.v, lam, other, columns, compared.numbers()
        )
        own_of = compared.of[columns.to(compared.of.device)]
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
        object.__setattr__(
            self, "objective", replace(objective, **changes) if changes else objective
        )

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
    positive_weight: "Tensor | float" = 1.0,
    negative_weight: "Tensor | float | None" = None,
    negative_columns: "Tensor | None" = None,
    sentence_ids: "Tensor | None" = None,
) -> "tuple[Tensor, Tensor | None]":
    """A harder positive and a harder negative for each anchor.

    Gradients flow through both parts of a mixture.

    Args:
        u: (N, D) float, the anchors.
        v: (M, D) float, M >= N, as in `losses.chunked_loss`.
        positive_weight: (N,) or one number, in [0, 1]: the share lam of v_i; 1 mixes nothing in.
        negative_weight: (N,) or one number, in [0, 1]: the share lam' of v_k; below
            `MIN_NEGATIVE_WEIGHT` it is raised to it. None: no harder negative.
        negative_columns: (N,) int64, the column k of each anchor.
        sentence_ids: (M,) or (G, M) int64, as in `losses.Columns`: a false negative is never the
            hardest. An anchor without any true negative keeps v_i.

    Returns: Unit vectors, (N, D) float32 (float64 for float64 inputs): the positives, and the
    negatives or None. ValueError: a tensor has another shape, or a negative weight has no columns.
    """
    import torch

    from fcse.losses import repeats, similarity_matrix, unit_rows

    with torch.autocast(u.device.type, enabled=False):
        sim = similarity_matrix(u.detach(), v.detach())
        if not 0 < len(u) <= len(v):
            raise ValueError(f"v must have a row for each of u's, got {len(v)} for {len(u)}")
        u, v = unit_rows(u), unit_rows(v)
    if sentence_ids is not None:
        sim = sim.masked_fill(repeats(sentence_ids, *sim.shape), -torch.inf)
    # No cosine is as low as -2: the positive is taken where no true negative is left.
    sim.diagonal().fill_(-2)
    positive = _mix(v[: len(u)], v[sim.argmax(dim=1)], positive_weight)
    if negative_weight is None:
        return positive, None
    if negative_columns is None or negative_columns.shape != (len(u),):
        raise ValueError(f"a negative weight needs negative_columns, ({len(u)},) int64")
    share = torch.as_tensor(negative_weight).clamp_min(MIN_NEGATIVE_WEIGHT)
    return positive, _mix(v[negative_columns.to(v.device)], u, share)


def _mix(a: "Tensor", b: "Tensor", weight: "Tensor | float") -> "Tensor":
    import torch

    from fcse.losses import unit_rows

    weight = torch.as_tensor(weight, dtype=a.dtype, device=a.device)
    if weight.shape not in ((), (len(a),)):
        raise ValueError(f"a mixing weight must be ({len(a)},), got {tuple(weight.shape)}")
    weight = weight.reshape(-1, 1)
    return unit_rows(weight * a + (1 - weight) * b)
