"""A temperature that changes along training, in place of the objective's own.

Not a published method: it is for asking whether a loss does more than such a schedule. By default
it holds the effective temperatures of Focal-InfoNCE along the study's training, see
`analysis.effects` and figures/study/along_training.csv: InfoNCE then looks as hard at hard
negatives as Focal-InfoNCE does at the same step, and has nothing else of it."""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np

from fcse.errors import InputError
from fcse.methods import Method, Moments, Start
from fcse.objectives import InfoNCE, name

FOCAL = "0.0301 0.0433 0.0499 0.0532 0.055 0.0558"
"""Focal-InfoNCE's: means over the runs of figures/study/along_training.csv, state by state."""


@dataclass(frozen=True)
class Schedule(Method):
    """Settings of a temperature schedule."""

    temperatures: str = FOCAL
    """Temperatures > 0, joined by spaces: the first before training, the last after it, others at
    equal distances between, with straight lines from each to the next; empty turns it off."""

    label = "temperature schedule"
    switches = ("temperatures",)

    def __post_init__(self) -> None:
        for tau in self.values:
            InfoNCE(tau)

    @property
    def values(self) -> list[float]:
        """The temperatures as numbers."""
        try:
            return [float(text) for text in self.temperatures.split()]
        except ValueError:
            raise InputError(
                f"schedule.temperatures must be numbers joined by spaces, got {self.temperatures!r}"
            ) from None

    def check(self, config: Any) -> None:
        """Raise InputError where the objective has no temperature."""
        own = config.objective
        if not is_dataclass(own) or "temperature" not in {f.name for f in fields(own)}:
            raise InputError(f"schedule.temperatures beside {name(own)}, which has no temperature")

    def begin(self, start: Start) -> Moments:
        """The temperatures, laid out over the run's steps."""
        return _Laid(self.values, start.config.steps)


class _Laid(Moments):
    def __init__(self, temperatures: list[float], steps: int) -> None:
        self.temperatures, self.steps = temperatures, steps

    def objective(self, step: int, objective: Any) -> Any:
        places = np.linspace(0, self.steps, len(self.temperatures))
        # A step begins where the one before has ended.
        return replace(objective, temperature=float(np.interp(step - 1, places, self.temperatures)))
