"""The neighbours of Focal-InfoNCE by name: the settings that each name stands for.

They change different things about InfoNCE, so each is a setting of its own, and several may be on
at once, beside any objective: what is added to the negatives (SSCL, CARDS), what is left out of
them (IFND), how their similarity counts (AdapACSE, the modulation), how a row's loss is weighted
(Core-tuning), and a second task beside it (DiffCSE).
"""

from typing import Any, Literal

Neighbour = Literal["sscl", "cards", "diffcse", "adap_acse", "ifnd", "core_tuning"]

SETTINGS: dict[str, dict[str, Any]] = {
    "sscl": {"layers": 1},
    "cards": {"neighbours": 8, "case_switch": 0.0},
    "diffcse": {"detection": 0.005},
    "adap_acse": {"margin": 0.05},
    "ifnd": {"acceptance": 0.5},
    "core_tuning": {"focal_weight": True, "mixing": True},
}
"""Neighbour -> what its name sets where a config does not say otherwise.

As their authors run them, but for CARDS' case switching, which needs a cased vocabulary and is
off until asked for, and IFND's acceptance, which has no counterpart in sentences.
"""

OFF: dict[str, Any] = {
    name: type(value)() for settings in SETTINGS.values() for name, value in settings.items()
}
"""Setting -> its neutral value, at which nothing changes."""
