"""The ablation panel: what each control changes, and that it shows what the module computes."""

import random
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fcse import analysis, losses
from fcse.losses import Columns
from fcse.methods.adap_acse import AdapACSE, turn
from fcse.methods.core_tuning import CoreTuning, FocalWeight
from fcse.objectives import FocalInfoNCE, HardnessInfoNCE, InfoNCE, key, name
from fcse.widgets import AblationPanel
from fcse.widgets.ablation import PRESETS

SENTENCES = [f"sentence {i} <b>" for i in range(32)]
CONTROLS = [
    ("temperature", 0.2),
    ("m", 0.8),
    ("positives", False),
    ("negatives", False),
    ("stop_gradient", True),
    ("margin", 0.2),
    ("focal_weight", True),
]


@pytest.fixture
def sim():
    matrix = torch.rand(32, 32, generator=torch.Generator().manual_seed(1)) * 0.7
    return matrix.fill_diagonal_(0.9)


@pytest.fixture
def teacher():
    return torch.rand(32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def panel(sim, teacher):
    return AblationPanel(sim, SENTENCES, teacher)


def shown_losses(panel):
    return [float(x) for x in re.findall(r"(?:InfoNCE|chosen) (\d+\.\d+)", panel._facts.value)]


def line(panel, column, index):
    return panel._lines[column][index].get_data()


@pytest.mark.parametrize(("control", "value"), CONTROLS)
def test_every_control_draws_another_picture_and_back(panel, control, value):
    before, facts = panel.png, panel._facts.value
    widget = getattr(panel, control)
    start, widget.value = widget.value, value
    assert panel.png != before
    assert panel.png.startswith(b"\x89PNG")
    assert panel._facts.value != facts
    widget.value = start
    assert panel.png == before


def test_alpha_acts_without_the_modulation_alone(panel):
    before = panel.png
    panel.alpha.value = 9.0
    assert panel.alpha.disabled
    assert panel.png == before
    panel.positives.value = panel.negatives.value = False
    assert not panel.alpha.disabled
    assert panel.m.disabled
    assert panel.stop_gradient.disabled
    assert panel.objective == HardnessInfoNCE(0.05, 9.0)
    before = panel.png
    panel.alpha.value = 3.0
    assert panel.png != before


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_sets_the_controls_in_one_redraw(panel, preset):
    panel.alpha.value, panel.m.value, panel.stop_gradient.value = 2.0, 0.7, True
    panel.positives.value = False
    panel.temperature.value = 0.1
    drawn = []
    panel._picture.observe(drawn.append, names="value")
    panel.presets[preset].click()
    assert len(drawn) == 1
    for control, value in PRESETS[preset].items():
        assert getattr(panel, control).value == value
    assert panel.objective.temperature == 0.1
    assert panel.objective == panel.config.objective
    assert key(panel.objective) == panel.config.settings["objective"] == preset


EXPECTED = {
    None: (FocalInfoNCE(), ()),
    "temperature": (FocalInfoNCE(0.2), ()),
    "m": (FocalInfoNCE(m=0.8), ()),
    "positives": (FocalInfoNCE(modulate="negative"), ()),
    "negatives": (FocalInfoNCE(modulate="positive"), ()),
    "stop_gradient": (FocalInfoNCE(stop_gradient=True), ()),
    "margin": (FocalInfoNCE(), (AdapACSE(0.2),)),
    "focal_weight": (FocalInfoNCE(), (CoreTuning(mixing=False),)),
}


@pytest.mark.parametrize(("control", "value"), [(None, None), *CONTROLS])
def test_the_loss_is_what_the_controls_say_and_the_config_trains(
    panel, control, value, sim, teacher
):
    if control:
        getattr(panel, control).value = value
    assert (panel.objective, panel.methods) == EXPECTED[control]
    assert (panel.config.objective, panel.config.methods) == EXPECTED[control]
    objective, _ = EXPECTED[control]
    columns = Columns(turns=(turn(0.2, teacher),) if control == "margin" else ())
    if control == "focal_weight":
        objective = FocalWeight(objective)
    weights = losses.gradient_weights(sim, *panel.seen)
    torch.testing.assert_close(weights, losses.gradient_weights(sim, objective, columns))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_the_views_show_the_numbers_of_the_module(panel, sim, preset, stop_gradient):
    panel.set_to(preset)
    panel.temperature.value, panel.m.value = 0.1, 0.5
    panel.stop_gradient.value = stop_gradient
    objective = panel.objective
    plain, chosen = shown_losses(panel)
    assert plain == pytest.approx(losses.info_nce(sim, 0.1).item(), abs=1e-4)
    assert chosen == pytest.approx(losses.loss(sim, objective).item(), abs=1e-4)

    curve, reference = (analysis.curve(each, points=101) for each in (objective, InfoNCE(0.1)))
    for column in ("logit", "slope"):
        for index, shown in ((2, column), (1, f"positive_{column}")):
            np.testing.assert_array_equal(line(panel, column, index)[1], curve[shown])
        np.testing.assert_array_equal(line(panel, column, 0)[1], reference[column])

    for bars, each in zip(panel._bars, (InfoNCE(0.1), objective), strict=True):
        heights = [bar.get_height() for bar in bars]
        np.testing.assert_allclose(heights, 100 * analysis.decile_shares(sim, each), rtol=1e-4)

    if preset == "focal_info_nce":
        rest = -0.5 if stop_gradient else -0.25
        assert panel._rest.get_xdata()[0] == rest
        assert f"−{-rest:.3f}" in panel._facts.value
        at_rest = torch.tensor([[0.9, rest]])
        assert losses.gradient_weights(at_rest, objective)[0, 1] == 0
    else:
        assert "not modulated" in panel._facts.value


@pytest.mark.parametrize("preset", PRESETS)
def test_a_margin_and_the_focal_weight_show_the_numbers_of_the_module(panel, sim, teacher, preset):
    panel.set_to(preset)
    panel.margin.value, panel.focal_weight.value = 0.3, True
    objective, columns = FocalWeight(panel.objective), Columns(turns=(turn(0.3, teacher),))
    _, chosen = shown_losses(panel)
    assert chosen == pytest.approx(losses.loss(sim, objective, columns).item(), abs=1e-4)
    heights = [bar.get_height() for bar in panel._bars[1]]
    shares = analysis.decile_shares(sim, objective, columns)
    np.testing.assert_allclose(heights, 100 * shares, rtol=1e-4)
    rows = losses.logits(sim, objective, columns)
    table = panel.table.set_index("candidate").sort_index()
    np.testing.assert_allclose(table["chosen"], rows.softmax(dim=1)[0], atol=1e-6)
    np.testing.assert_allclose(table["plain"], (sim / 0.05).softmax(dim=1)[0], atol=1e-6)
    assert "margin" in panel._facts.value
    assert "focal weight" in panel._facts.value


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_with_a_margin_a_negative_rests_where_the_loss_leaves_it(panel, stop_gradient):
    panel.margin.value, panel.stop_gradient.value = 0.2, stop_gradient
    rest = panel._rest.get_xdata()[0]
    assert f"−{-rest:.3f}" in panel._facts.value
    at_rest = torch.tensor([[0.9, rest]], dtype=torch.float64)
    columns = Columns(turns=(turn(0.2),))
    weights = losses.gradient_weights(at_rest, panel.objective, columns)
    assert weights[0, 1].abs() < 1e-12


def test_no_resting_point_is_named_where_no_negative_is_turned_to_it(panel):
    panel.m.value, panel.stop_gradient.value, panel.margin.value = 1.0, True, 0.5
    assert "no negative is turned to it" in panel._facts.value


def test_without_a_teacher_the_margin_rests(sim):
    panel = AblationPanel(sim, SENTENCES)
    before = panel.png
    assert panel.margin.disabled
    panel.margin.value = 0.3
    assert panel.png == before
    assert panel.methods == panel.config.methods == ()
    assert panel.seen == (panel.objective, Columns())


def test_the_table_is_the_softmax_of_the_anchor_chosen(panel, sim):
    panel.anchor.value = 7
    table = panel.table.set_index("candidate").sort_index()
    rows = losses.logits(sim, FocalInfoNCE(0.05, 0.3)).softmax(dim=1)[7]
    np.testing.assert_allclose(table["chosen"], rows, atol=1e-6)
    np.testing.assert_allclose(table["plain"], (sim / 0.05).softmax(dim=1)[7], atol=1e-6)
    assert panel.table["similarity"].is_monotonic_decreasing
    shown = panel._candidates.value
    assert shown.count("<tr") == 1 + 8
    assert "sentence 7 &lt;b&gt;" in shown
    assert f"{100 * rows[7]:.2f}" in shown


def test_the_positive_is_in_the_table_however_far_it_is(sim):
    panel = AblationPanel(sim.fill_diagonal_(-0.5), SENTENCES)
    assert panel._candidates.value.count(">positive<") == 1
    assert panel._candidates.value.count(">negative<") == 7


def test_the_coldest_and_warmest_temperatures_show_numbers(panel):
    for preset in PRESETS:
        panel.set_to(preset)
        for temperature in (panel.temperature.min, panel.temperature.max):
            panel.temperature.value = temperature
            assert "nan" not in panel._facts.value + panel._picture.value[:600]
            assert all(np.isfinite(bar.get_height()) for bars in panel._bars for bar in bars)


def test_the_picture_says_in_words_what_it_shows(panel, sim):
    hardest = 100 * analysis.decile_shares(sim, "focal_info_nce")[-1]
    assert re.search(rf'alt="[^"]*Focal-InfoNCE[^"]* {hardest:.0f} %', panel._picture.value)


def test_a_redraw_leaves_the_random_state_alone(panel):
    def states():
        name, keys, *rest = np.random.get_state()
        return random.getstate(), torch.get_rng_state().tolist(), name, keys.tolist(), rest

    before = states()
    panel.m.value, panel.anchor.value = 0.6, 3
    panel.set_to("hardness_info_nce")
    assert states() == before


def test_a_batch_without_its_sentences_is_refused(sim):
    with pytest.raises(ValueError, match=r"\(32, 32\) for 31"):
        AblationPanel(sim, SENTENCES[:31])


@dataclass(frozen=True)
class Cubic:
    """A reader's own: the cube of the similarity, over tau."""

    temperature: float = 0.1
    rest: float = 0.2

    def logits(self, sim, positives):
        return (sim - self.rest) ** 3 / self.temperature + sim.square().where(positives, 0)


def test_a_reader_s_own_objective_has_a_button_and_is_shown_by_its_numbers(sim):
    mine = Cubic(0.2)
    panel = AblationPanel(sim, SENTENCES, own=[mine, Cubic()])
    assert list(panel.presets) == [*PRESETS, "Cubic (temperature=0.2)", "Cubic"]
    before = panel.png
    panel.presets[name(mine)].click()
    assert panel.png != before
    assert panel.objective is panel.config.objective is mine
    plain, chosen = shown_losses(panel)
    assert plain == pytest.approx(losses.info_nce(sim, 0.2).item(), abs=1e-4)
    assert chosen == pytest.approx(losses.loss(sim, mine).item(), abs=1e-4)
    curve = analysis.curve(mine, points=101)
    np.testing.assert_array_equal(line(panel, "slope", 2)[1], curve["slope"])
    np.testing.assert_array_equal(line(panel, "slope", 1)[1], curve["positive_slope"])
    heights = [bar.get_height() for bar in panel._bars[1]]
    np.testing.assert_allclose(heights, 100 * analysis.decile_shares(sim, mine), rtol=1e-4)
    assert "Cubic (temperature=0.2)" in panel._facts.value
    assert "pull by decile: Cubic (temperature=0.2) beside InfoNCE at temperature 0.2." in panel.alt
    panel.focal_weight.value = True
    assert panel.config.name == "Cubic (temperature=0.2) + Core-tuning (mixing=False)"
    panel.m.value = 0.5  # a control of the kit's objectives: back to them
    assert isinstance(panel.objective, InfoNCE | FocalInfoNCE)
    panel.set_to("Cubic")
    assert panel.objective == Cubic()
