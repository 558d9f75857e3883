"""Objectives as values: what is refused, what they are called, and what a row may depend on."""

from dataclasses import dataclass

import pytest
import torch
from conftest import one_line_refusal
from formulas import OBJECTIVES, OWN, SHARP, kinds, loss_and_weights, similarities

from fcse.losses import focal_info_nce, hardness_info_nce, info_nce, require_sound
from fcse.methods.core_tuning import FocalWeight
from fcse.objectives import (
    VARIANTS,
    FocalInfoNCE,
    HardnessInfoNCE,
    InfoNCE,
    key,
    name,
    named,
    rank,
)

OUTSIDE = (-1.0, float("nan"), float("inf"))


@pytest.mark.parametrize("temperature", [0.0, *OUTSIDE])
def test_a_bad_temperature_is_refused(temperature):
    for make in (InfoNCE, FocalInfoNCE, HardnessInfoNCE):
        with one_line_refusal("temperature must be"):
            make(temperature)
    for short in (info_nce, focal_info_nce, hardness_info_nce):
        with pytest.raises(ValueError, match="temperature must be"):
            short(torch.eye(3), temperature)


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        *(({"m": m}, "m must be") for m in OUTSIDE[1:]),
        *(({"modulate": part}, "unknown modulate") for part in ("neither", "")),
    ],
)
def test_bad_modulation_is_refused(parameters, match):
    with one_line_refusal(match):
        FocalInfoNCE(**parameters)
    with pytest.raises(ValueError, match=match):
        focal_info_nce(torch.eye(3), **parameters)


@pytest.mark.parametrize("alpha", OUTSIDE)
def test_bad_alpha_is_refused(alpha):
    with one_line_refusal("alpha must be"):
        HardnessInfoNCE(alpha=alpha)
    with pytest.raises(ValueError, match="alpha must be"):
        hardness_info_nce(torch.eye(3), alpha=alpha)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("info_nce", InfoNCE(0.05)),
        ("focal_info_nce", FocalInfoNCE(0.05, 0.3, "both", False)),
        ("hardness_info_nce", HardnessInfoNCE(0.05, 9.0)),
        (InfoNCE(0.1), InfoNCE(0.1)),
        *((own, own) for own in OWN),
    ],
)
def test_a_name_stands_for_published_defaults_and_a_value_for_itself(objective, expected):
    assert named(objective) == expected
    assert type(named(objective)) is type(expected)


class Plain:
    def logits(self, sim, positives):
        return sim


@dataclass
class Changeable(Plain):
    pass


@dataclass(frozen=True)
class WithoutLogits:
    temperature: float = 1.0


@dataclass(frozen=True)
class NoMethod:
    logits: float = 1.0


@pytest.mark.parametrize(
    ("objective", "match"),
    [
        ("triplet", "unknown objective 'triplet': choose from info_nce"),
        (Plain(), "is none: give a name .* frozen dataclass"),
        (InfoNCE, "is none: give a name"),
        (None, "objective None is none"),
        (3, "objective 3 is none"),
        (Changeable(), r"Changeable can change: write @dataclass\(frozen=True\)"),
        (WithoutLogits(), "WithoutLogits has no logits"),
        (NoMethod(), "NoMethod has no logits"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_objective_is_refused(objective, match):
    with one_line_refusal(match):
        named(objective)


def canonical(objective):
    return objective.canonical() if hasattr(objective, "canonical") else objective


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_equal_losses_and_no_others_have_one_way_to_be_written(temperature):
    s = similarities(6, 11)
    written = {}
    for objective in (x for m in (0.3, -0.2) for x in kinds(temperature, m)):
        _, weights = loss_and_weights(s, objective)
        written.setdefault(canonical(objective), weights)
        assert (written[canonical(objective)] == weights).all()
    assert len({weights.tobytes() for weights in written.values()}) == len(written)


@pytest.mark.parametrize(
    ("objective", "printed", "called"),
    [
        (InfoNCE(), "InfoNCE", "info_nce"),
        (InfoNCE(0.025), "InfoNCE (temperature=0.025)", "info_nce"),
        (InfoNCE(1), "InfoNCE (temperature=1.0)", "info_nce"),
        (FocalInfoNCE(), "Focal-InfoNCE", "focal_info_nce"),
        (FocalInfoNCE(modulate="positive"), "Focal-InfoNCE (modulate=positive)", "focal_info_nce"),
        (HardnessInfoNCE(), "Hardness-InfoNCE", "hardness_info_nce"),
        (OWN[1], "WholeRow", "whole_row"),
        (OWN[2], "Weighed (temperature=0.3)", "weighed"),
    ],
)
def test_names_are_made_of_label_and_parameters(objective, printed, called):
    assert (name(objective), key(objective)) == (printed, called)


def test_unlike_losses_have_unlike_names():
    different = {*SHARP, *OBJECTIVES, *kinds(0.5, -0.2), *OWN}
    different |= {FocalWeight(x) for x in different}
    assert len({name(x) for x in different}) == len(different)
    # The class decides too: a reader's own of the same name and parameters is no loss of the kit.
    kit = InfoNCE()
    own = dataclass(frozen=True)(type("InfoNCE", (InfoNCE,), {}))()
    assert (name(own), key(own)) == ("own InfoNCE", "own_info_nce") != (name(kit), key(kit))


def test_variants_come_in_their_order_and_others_behind():
    names = [name(x) for x in VARIANTS]
    assert sorted(["WholeRow", *reversed(names)], key=rank) == [*names, "WholeRow"]


@dataclass(frozen=True)
class Made:
    """Logits and slopes as a test wants them."""

    of: object
    slopes_of: object = None

    def logits(self, sim, positives):
        return self.of(sim, positives)

    def __getattr__(self, attribute):
        if attribute == "slopes" and self.slopes_of is not None:
            return self.slopes_of
        raise AttributeError(attribute)


@pytest.mark.parametrize("objective", [*SHARP, *VARIANTS, *OWN, *map(FocalWeight, OWN)], ids=name)
def test_objectives_of_independent_rows_are_sound(objective):
    require_sound(objective)


@pytest.mark.parametrize(
    "logits",
    [
        lambda sim, positives: sim - sim.mean(),
        lambda sim, positives: sim - sim.mean(dim=0),
        lambda sim, positives: sim / len(sim),
        lambda sim, positives: sim + (sim.mean() - sim.mean().detach()),
        lambda sim, positives: sim.detach() + (sim - sim.detach()) * len(sim),
        lambda sim, positives: (
            sim * sim.detach().mean() / sim.detach().mean().detach() + sim.sum(0)
        ),
        lambda sim, positives: sim - sim.diagonal().mean(),
        lambda sim, positives: sim * (1 + positives.sum()),
        lambda sim, positives: sim.where(~torch.eye(*sim.shape, dtype=torch.bool), sim.square()),
        lambda sim, positives: sim[:, 1:],
        lambda sim, positives: sim.mean(dim=1),
        lambda sim, positives: None,
    ],
)
def test_rows_that_depend_on_each_other_are_refused(logits):
    with one_line_refusal("rows depend on each other in Made"):
        require_sound(Made(logits))


@pytest.mark.parametrize(
    "weight",
    [
        lambda log_p: log_p / log_p.mean(),
        lambda log_p: log_p.softmax(dim=0),
        lambda log_p: log_p.mean().detach() + 0 * log_p,
        lambda log_p: 1 + log_p.sum() - log_p.sum().detach() + 0 * log_p,
        lambda log_p: log_p[:, None],
        lambda log_p: log_p.mean(),
        lambda log_p: 1.0,
    ],
)
def test_row_weights_that_depend_on_other_rows_are_refused(weight):
    with one_line_refusal("rows depend on each other in Heavy: the weight of a row"):
        require_sound(type("Heavy", (InfoNCE,), {"row_weight": lambda self, x: weight(x)})())


def test_slopes_that_are_not_those_of_the_logits_are_refused():
    def square(sim, positives):
        return sim.square()

    require_sound(Made(square, lambda sim, positives: 2 * sim))
    for wrong in (lambda s, p: s, lambda s, p: 2 * s.abs(), lambda s, p: 2 * s + 1e-6 * p):
        with one_line_refusal("slopes of Made .* are not those of its logits"):
            require_sound(Made(square, wrong))
    # Of a logit that depends on its whole row there are none.
    with one_line_refusal("slopes"):
        require_sound(Made(OWN[1].logits, lambda s, p: 1 / (0.3 + s.square().mean(1, True))))


def test_soundness_is_checked_without_gradients_too():
    with torch.no_grad():
        require_sound(FocalWeight(FocalInfoNCE()))
        with one_line_refusal("rows depend"):
            require_sound(Made(lambda sim, positives: sim + (sim.mean() - sim.mean().detach())))
