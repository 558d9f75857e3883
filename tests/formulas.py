"""The losses written out entry by entry, in float64 and without torch; objectives to try them on.

They read an objective's parameters and call nothing of it.
"""

from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from fcse.objectives import FocalInfoNCE, HardnessInfoNCE, InfoNCE, Modulate

MODULATES = get_args(Modulate)


def kinds(temperature, m=0.3):
    """Every kind of loss in the kit."""
    return (
        InfoNCE(temperature),
        *(FocalInfoNCE(temperature, m, p, stop) for p in MODULATES for stop in (False, True)),
        *(HardnessInfoNCE(temperature, alpha) for alpha in (0.0, 9.0)),
    )


OBJECTIVES, SHARP = kinds(0.2), kinds(0.05)


def similarities(rows, columns, seed=0):
    """Random similarities with the values where a formula is most likely to go wrong."""
    sim = np.random.default_rng(seed).uniform(-1, 1, (rows, columns))
    corners = [(0, 0, 1.0), (1, 1, 0.0), (2, 2, -1.0), (0, 1, 1.0), (1, 0, 0.0), (2, 0, -1.0)]
    for row, column, value in corners:
        if row < rows and column < columns:
            sim[row, column] = value
    return sim


def logit_and_slope(objective, s, positive):
    """Of one similarity."""
    z, slope = s, 1.0
    part = "positive" if positive else "negative"
    if isinstance(objective, FocalInfoNCE) and objective.modulate in ("both", part):
        m = 0.0 if positive else objective.m
        z, slope = s * (s + m), s + m if objective.stop_gradient else 2 * s + m
    z, slope = z / objective.temperature, slope / objective.temperature
    if isinstance(objective, HardnessInfoNCE) and not positive:
        z += objective.alpha * s  # a constant to the gradient
    return z, slope


def turned(s, margin, t):
    """s' of a negative and ds'/ds, through the angle itself."""
    theta, d = np.arccos(s), (1 - t) * margin
    if theta <= margin:
        return s, 1.0
    # No finite slope at the end of the scale: that of the cosine's part is taken.
    return np.cos(theta - d), np.sin(theta - d) / np.sin(theta) if abs(s) < 1 else np.cos(d)


def loss_and_weights(
    sim, objective, groups=(), margin=0.0, teacher=None, focal_weight=False
) -> tuple[float, np.ndarray]:
    """The loss and dL/dsim, over the candidates that a row is left with."""
    value, weights = 0.0, np.zeros_like(sim)
    for i, row in enumerate(sim):
        z, slope = {}, {}
        for j, s in enumerate(row):
            if j == i or not any(ids[j] == ids[i] for ids in groups):
                x, dx = turned(s, margin, teacher[i, j]) if margin and j != i else (s, 1.0)
                z[j], slope[j] = logit_and_slope(objective, x, j == i)
                slope[j] *= dx
        top = max(z.values())
        log_total = top + np.log(sum(np.exp(x - top) for x in z.values()))
        log_p = z[i] - log_total
        p = np.exp(log_p)
        value -= (1 - p) * log_p if focal_weight else log_p
        share = 1 - p - p * log_p if focal_weight else 1.0
        for j in z:
            weights[i, j] = share * (np.exp(z[j] - log_total) - (j == i)) * slope[j]
    return value / len(sim), weights / len(sim)


@dataclass(frozen=True)
class WithoutSlopes:
    """The logits of another objective, without their closed form."""

    objective: Any

    def logits(self, sim, positives):
        return self.objective.logits(sim, positives)


@dataclass(frozen=True)
class WholeRow:
    """Each logit depends on all similarities of its row."""

    temperature: float = 0.3

    def logits(self, sim, positives):
        return sim / (self.temperature + sim.square().mean(dim=1, keepdim=True))


@dataclass(frozen=True)
class Weighed(InfoNCE):
    """A row's loss counts 1 + p^gamma."""

    gamma: float = 2.0

    def row_weight(self, log_p):
        return 1 + (self.gamma * log_p).exp()


OWN = (WithoutSlopes(FocalInfoNCE(0.2)), WholeRow(), Weighed(0.3))
"""Objectives as readers may write them."""
