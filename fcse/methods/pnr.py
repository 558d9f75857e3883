"""PNR: pseudo-negatives of the previous model, in continual training on one corpus after another.

Source: Cha et al., ICML 2024, "Regularizing with Pseudo-Negatives for Continual Self-Supervised
Learning" (arXiv 2306.05101), with their code (github.com/csm9493/PNR). With u and v the views of
the model that is trained, f the frozen previous model's vector and g a small network:
- L1, in place of the loss: u against v, and the vectors f of other sentences are negatives too.
- L2, beside it: g(u) against f, and the vectors v of other sentences are negatives too.
Both terms have the negatives of both models, so that the one does not undo what the other does.
Theirs is a method for images, with SimCLR, MoCo and others; they name text as future work.

Without `pseudo_negatives` and `own_negatives` the rest is distillation alone, after CaSSLe (Fini et
al., CVPR 2022) in one direction; theirs averages two. With no term on, it is fine-tuning.
Where this differs from their code:
- Sentences, and dropout for a view. Their frozen model sees another augmentation; here it has no
  dropout, so that a sentence has one f. That is left out of its own row in L1, and is the positive
  in the denominator of L2, as in their version for MoCo. Their version for SimCLR has it the other
  way round.
- Negatives are those of the batch, as in their version for SimCLR; no queue of 65,536.
- u is the anchor, as in SimCSE. They exchange the views and average.
- The run's temperature, 0.05 by default, for both terms. They take 0.2.
- L2 is of the objective that the run has, modulated where that is.
- AdamW, a head on the first token; there LARS, a projector, 500 epochs a task."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from fcse.errors import InputError
from fcse.methods import Comparison, Loss, Method, Moments, Start
from fcse.objectives import require

if TYPE_CHECKING:
    from torch import Tensor, nn

Norm = Literal["batch", "layer"]

_WIDTH = 2048
"""Of the middle of g, as theirs."""


@dataclass(frozen=True)
class PNR(Method):
    """Settings of PNR (Cha et al. 2024)."""

    previous: str = ""
    """Folder of the run to go on from: the start, and a frozen copy beside; else the run's own
    encoder is both."""
    pseudo_negatives: bool = True
    """Take the previous model's vectors as negatives of the loss too."""
    distillation: float = 1.0
    """Weight of the second term, that of g(u) against the previous model's vector, >= 0."""
    own_negatives: bool = True
    """Take the trained model's vectors as negatives of the second term too."""
    norm: Norm = "batch"
    """Normalisation within g: over the batch, as theirs, or over each vector."""

    label = "PNR"
    switches = ("pseudo_negatives", "distillation")

    def __post_init__(self) -> None:
        require("pnr.distillation", self.distillation)
        if self.norm not in get_args(Norm):
            choices = ", ".join(get_args(Norm))
            raise InputError(f"unknown pnr.norm {self.norm!r}: choose from {choices}")

    @property
    def starts_from(self) -> str | None:
        """The previous run."""
        return self.previous or None

    def begin(self, start: Start) -> Moments:
        """Copy the encoder and make g; InputError: batch normalisation and several processes."""
        from fcse import processes

        if self.distillation and self.norm == "batch" and processes.world().num_processes > 1:
            raise InputError("pnr.norm batch needs a batch in one process: set pnr.norm to layer")
        return _BothModels(self, start)


class _BothModels(Moments):
    def __init__(self, settings: PNR, start: Start) -> None:
        import copy

        encoder = start.encoder
        self.settings = settings
        self.previous = copy.deepcopy(encoder).eval().requires_grad_(False)
        if settings.distillation:
            g = predictor(encoder.dimension, settings.norm, start.config.seed)
            self.module = g.to(encoder.device)

    def loss(self, value: Loss, compared: Comparison) -> "Tensor":
        import torch

        from fcse import processes
        from fcse.losses import full_precision

        settings, size = self.settings, compared.batch.size
        with torch.no_grad(), torch.autocast(compared.u.device.type, enabled=False):
            f = processes.gather_rows(self.previous(compared.token_ids)[0])
        place = compared.place()
        whole = value(compared.more(f, place) if settings.pseudo_negatives else compared)
        if not settings.distillation:
            return whole
        second = replace(
            compared,
            u=self.module(full_precision(compared.u)),
            v=f,
            of=place,
            ids=compared.ids[:size],
            always=compared.always[:size],
            own=None,
            own_of=None,
        )
        if settings.own_negatives:
            second = second.more(compared.v[:size].to(f), place)
        return whole + settings.distillation * value(second)


def predictor(width: int, norm: Norm, seed: int) -> "nn.Sequential":
    """g, from (n, width) to (n, width) float: a linear layer, norm, ReLU, a linear layer."""
    import torch
    from torch import nn

    kind = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}[norm]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(width, _WIDTH), kind(_WIDTH), nn.ReLU(), nn.Linear(_WIDTH, width)
        )


def neighbour_overlap(before: np.ndarray, after: np.ndarray, k: int = 10) -> float:
    """How much of a space is left: the share of each sentence's k nearest that stayed among them.

    before, after: (n, D) float of the same n sentences by two encoders. 0 to 1, mean over
    sentences; two unrelated spaces have k / (n - 1). InputError: k is not below n."""
    from fcse.encoder.nearest import nearest

    pairs = zip(nearest(before, k), nearest(after, k), strict=True)
    return float(np.mean([len(np.intersect1d(a, b)) / k for a, b in pairs]))
