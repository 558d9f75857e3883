"""Configs that compute different things differ in name and in their row of a report."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import one_line_refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from fcse import losses, methods
from fcse.config import TrainConfig, configured, recorded
from fcse.losses import FocalInfoNCE, HardnessInfoNCE, InfoNCE
from fcse.methods.adap_acse import AdapACSE
from fcse.methods.cards import CARDS
from fcse.methods.core_tuning import CoreTuning
from fcse.methods.diffcse import DiffCSE
from fcse.methods.ifnd import IFND
from fcse.methods.sscl import SSCL
from fcse.study.report import load_runs

POSITIVE = st.sampled_from([0.01, 0.05, 0.0500001, 0.07, 1.0])
SHARE = st.sampled_from([0.0, 0.05, 0.3, 1.0])
OBJECTIVE = st.one_of(
    st.builds(InfoNCE, POSITIVE),
    st.builds(
        FocalInfoNCE,
        POSITIVE,
        st.sampled_from([-0.1, 0.0, 0.3]),
        st.sampled_from(["both", "positive", "negative", "none"]),
        st.booleans(),
    ),
    st.builds(HardnessInfoNCE, POSITIVE, st.sampled_from([0.0, 2.0, 9.0])),
)
METHODS = st.fixed_dictionaries(
    {},
    optional={
        "sscl": st.builds(SSCL, st.integers(0, 3)),
        "cards": st.builds(CARDS, k=st.sampled_from([0, 8, 64]), case_switch=SHARE),
        "diffcse": st.builds(
            DiffCSE,
            st.sampled_from([0.0, 0.005, 1.0]),
            st.sampled_from(["trained", "unigrams"]),
            st.booleans(),
            st.booleans(),
        ),
        "adap_acse": st.builds(AdapACSE, SHARE, st.sampled_from(["minilm", "other"])),
        "ifnd": st.builds(IFND, SHARE, st.sampled_from([5, 500]), st.sampled_from([None, 9])),
        "core_tuning": st.builds(CoreTuning, st.booleans(), st.just(False)),
    },
).map(lambda on: tuple(on.values()))
CONFIG = st.builds(
    TrainConfig,
    objective=OBJECTIVE,
    methods=METHODS,
    learning_rate=st.sampled_from([1e-4, 3e-5]),
    steps=st.sampled_from([3, 100]),
)


def rows(folder, *configs):
    """The (name, settings) of each config in a report of runs of all of them."""
    for i, config in enumerate(configs):
        path = folder / str(i)
        path.mkdir(exist_ok=True, parents=True)
        record = {"finished": True, "config": config.settings}
        (path / "run.json").write_text(json.dumps(record))
    runs = load_runs(folder).assign(place=lambda table: table["folder"].map(lambda p: p.name))
    runs = runs.sort_values("place")
    return list(zip(runs["name"], runs["settings"], strict=True))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(a=CONFIG, b=CONFIG)
def test_two_configs_that_differ_are_two_rows(tmp_path_factory, a, b):
    first, second = rows(tmp_path_factory.mktemp("runs"), a, b)
    assert (first == second) == (a == b)
    assert (a.name == b.name) == ((a.objective, a.methods) == (b.objective, b.methods))
    assert (a.run_name == b.run_name) == (a == b)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(a=OBJECTIVE, b=OBJECTIVE)
def test_equal_names_mean_equal_losses(a, b):
    generator = torch.Generator().manual_seed(0)
    sim = 2 * torch.rand(5, 7, dtype=torch.float64, generator=generator) - 1
    names = [TrainConfig(objective=each).name for each in (a, b)]
    pulls = [losses.gradient_weights(sim, each) for each in (a, b)]
    assert (names[0] == names[1]) == torch.equal(*pulls)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(config=CONFIG)
def test_settings_by_their_names_give_the_config_back(config):
    given_back = json.loads(json.dumps(config.settings))
    assert configured(TrainConfig(), given_back) == recorded(given_back) == config


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (
            {"objective": FocalInfoNCE(stop_gradient=True)},
            {"objective": FocalInfoNCE(stop_gradient=True, modulate="positive")},
        ),
        (
            {"methods": (CoreTuning(mixing=False),)},
            {"methods": (CoreTuning(),)},
        ),
        ({"methods": (AdapACSE(0.1),)}, {"methods": (AdapACSE(0.2),)}),
    ],
    ids=["stop_gradient", "core_tuning", "margin"],
)
def test_losses_that_once_shared_a_name(tmp_path, a, b):
    a, b = TrainConfig(**a), TrainConfig(**b)
    assert a.name != b.name
    first, second = rows(tmp_path, a, b)
    assert first != second


CELL = """
from dataclasses import dataclass
from fcse.methods import Method, Moments

POWER = 2

def bent(sim):
    return sim.abs() ** POWER

@dataclass(frozen=True)
class Bent:
    temperature: float = 0.05
    def logits(self, sim, positives):
        return bent(sim) / self.temperature

class _Warm(Moments):
    def __init__(self, factor):
        self.factor = 2 * factor
    def objective(self, step, objective):
        return [objective for _ in range(3)][0]

@dataclass(frozen=True)
class Warm(Method):
    factor: float = 2.0
    def begin(self, start):
        return _Warm(self.factor)
"""


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("POWER = 2", "POWER = 3"),
        ("return sim.abs()", "return sim.exp()"),
        ("temperature: float = 0.05", "temperature: float = 0.1"),
        ("/ self.temperature", "* self.temperature"),
        ("2 * factor", "3 * factor"),
        ("range(3)", "range(4)"),
        ("factor: float = 2.0", "factor: float = 1.0"),
        ("_Warm(self.factor)", "_Warm(1 / self.factor)"),
    ],
)
def test_classes_of_one_name_that_do_other_things_are_two_rows(tmp_path, part, other):
    """Defined in a notebook's cell that was changed: all that the class uses there counts."""
    configs = []
    for text in (CELL, CELL, CELL.replace(part, other)):
        cell = {"__name__": "__main__"}
        exec(text, cell)
        configs.append(TrainConfig(objective=cell["Bent"](), methods=(cell["Warm"](),)))
    same, again, changed = configs
    assert {config.name for config in configs} == {"Bent + Warm"}
    assert same.run_name == again.run_name != changed.run_name
    first, second, third = rows(tmp_path, *configs)
    assert first == second != third
    assert all(name.startswith("Bent + Warm [code ") for name, _ in (first, third))


def test_names_spell_parameters_as_the_code_does():
    focal = FocalInfoNCE(0.1, modulate="negative", stop_gradient=True)
    config = TrainConfig(objective=focal, methods=(SSCL(2), CARDS(k=4, case_switch=0.0)))
    assert config.name == (
        "Focal-InfoNCE (temperature=0.1, modulate=negative, stop_gradient=True) "
        "+ CARDS (k=4, retrieval only) + SSCL"
    )
    assert TrainConfig().name == "Focal-InfoNCE"
    assert TrainConfig(objective=InfoNCE(1)).name == "InfoNCE (temperature=1.0)"


def test_a_method_by_its_name_is_that_with_its_authors_values():
    for name in methods.names():
        by_name = TrainConfig(objective=name)
        assert by_name == TrainConfig(objective=InfoNCE(), methods=(methods.method(name)(),))
        assert by_name.settings["objective"] == f"info_nce+{name}"


def test_a_parameter_beside_a_value_is_refused():
    assert configured(TrainConfig(), {"objective": "info_nce", "m": 0.1}).objective == InfoNCE()
    with one_line_refusal("temperature beside an objective that is a value"):
        configured(TrainConfig(), {"objective": InfoNCE(0.1), "temperature": 0.2})
    config = replace(TrainConfig(), objective=InfoNCE(0.1))
    assert configured(config, {"temperature": 0.2}).objective == InfoNCE(0.2)
