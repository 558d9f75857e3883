"""The ablation panel: what each control changes, and that it shows what the module computes."""

import random
import re

import numpy as np
import pytest
import torch

from fcse import analysis, losses
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
    assert panel.loss == {"objective": "hardness_info_nce", "temperature": 0.05, "alpha": 9.0}
    before = panel.png
    panel.alpha.value = 3.0
    assert panel.png != before


@pytest.mark.parametrize("key", PRESETS)
def test_a_preset_sets_the_controls_in_one_redraw(panel, key):
    panel.alpha.value, panel.m.value, panel.stop_gradient.value = 2.0, 0.7, True
    panel.positives.value = False
    panel.temperature.value = 0.1
    drawn = []
    panel._picture.observe(drawn.append, names="value")
    panel.presets[key].click()
    assert len(drawn) == 1
    for name, value in PRESETS[key].items():
        assert getattr(panel, name).value == value
    assert panel.loss["temperature"] == 0.1
    assert panel.loss["objective"] == panel.config.key == key


@pytest.mark.parametrize("setting", [{}, *({control: value} for control, value in CONTROLS)])
def test_the_loss_is_what_the_module_takes_and_the_config_trains(panel, setting, sim, teacher):
    for control, value in setting.items():
        getattr(panel, control).value = value
    config = panel.config
    trained = {name: getattr(config, name) for name in ("objective", "temperature", "m", "alpha")}
    trained |= {"modulate": config.modulate, "stop_gradient": config.stop_gradient}
    trained |= {name: config.option(name) for name in ("margin", "focal_weight")}
    weights = losses.gradient_weights(sim, **panel.loss, teacher=teacher)
    torch.testing.assert_close(weights, losses.gradient_weights(sim, **trained, teacher=teacher))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("stop_gradient", [False, True])
def test_the_views_show_the_numbers_of_the_module(panel, sim, preset, stop_gradient):
    panel.set_to(preset)
    panel.temperature.value, panel.m.value = 0.1, 0.5
    panel.stop_gradient.value = stop_gradient
    loss = panel.loss
    plain, chosen = shown_losses(panel)
    assert plain == pytest.approx(losses.info_nce(sim, 0.1).item(), abs=1e-4)
    assert chosen == pytest.approx(losses.loss(sim, **loss).item(), abs=1e-4)

    curve = analysis.curve(101, **loss)
    for column in ("logit", "slope"):
        for index, name in ((2, column), (1, f"positive_{column}")):
            np.testing.assert_array_equal(line(panel, column, index)[1], curve[name])
        reference = analysis.curve(101, objective="info_nce", temperature=0.1)
        np.testing.assert_array_equal(line(panel, column, 0)[1], reference[column])

    for bars, each in zip(
        panel._bars, ({"objective": "info_nce", "temperature": 0.1}, loss), strict=True
    ):
        heights = [bar.get_height() for bar in bars]
        np.testing.assert_allclose(heights, 100 * analysis.decile_shares(sim, **each), rtol=1e-4)

    if preset == "focal_info_nce":
        rest = -0.5 if stop_gradient else -0.25
        assert panel._rest.get_xdata()[0] == rest
        assert f"−{-rest:.3f}" in panel._facts.value
        at_rest = torch.tensor([[0.9, rest]])
        assert losses.gradient_weights(at_rest, **loss)[0, 1] == 0
    else:
        assert "not modulated" in panel._facts.value


@pytest.mark.parametrize("preset", PRESETS)
def test_a_margin_and_the_focal_weight_show_the_numbers_of_the_module(panel, sim, teacher, preset):
    panel.set_to(preset)
    panel.margin.value, panel.focal_weight.value = 0.3, True
    loss = panel.loss | {"teacher": teacher}
    assert loss["margin"] == 0.3
    _, chosen = shown_losses(panel)
    assert chosen == pytest.approx(losses.loss(sim, **loss).item(), abs=1e-4)
    heights = [bar.get_height() for bar in panel._bars[1]]
    np.testing.assert_allclose(heights, 100 * analysis.decile_shares(sim, **loss), rtol=1e-4)
    rows = losses.logits(sim, **analysis.logit_arguments(**loss))
    table = panel.table.set_index("candidate").sort_index()
    np.testing.assert_allclose(table["chosen"], rows.softmax(dim=1)[0], atol=1e-6)
    np.testing.assert_allclose(table["info_nce"], (sim / 0.05).softmax(dim=1)[0], atol=1e-6)
    assert "margin" in panel._facts.value
    assert "focal weight" in panel._facts.value


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_with_a_margin_a_negative_rests_where_the_loss_leaves_it(panel, stop_gradient):
    panel.margin.value, panel.stop_gradient.value = 0.2, stop_gradient
    rest = panel._rest.get_xdata()[0]
    assert f"−{-rest:.3f}" in panel._facts.value
    at_rest = torch.tensor([[0.9, rest]], dtype=torch.float64)
    weights = losses.gradient_weights(at_rest, **panel.loss, teacher=torch.zeros(1, 2))
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
    assert "margin" not in panel.loss


def test_the_table_is_the_softmax_of_the_anchor_chosen(panel, sim):
    panel.anchor.value = 7
    table = panel.table.set_index("candidate").sort_index()
    rows = losses.logits(sim, 0.05, 0.3).softmax(dim=1)[7]
    np.testing.assert_allclose(table["chosen"], rows, atol=1e-6)
    np.testing.assert_allclose(table["info_nce"], (sim / 0.05).softmax(dim=1)[7], atol=1e-6)
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
    for key in PRESETS:
        panel.set_to(key)
        for temperature in (panel.temperature.min, panel.temperature.max):
            panel.temperature.value = temperature
            assert "nan" not in panel._facts.value + panel._picture.value[:600]
            assert all(np.isfinite(bar.get_height()) for bars in panel._bars for bar in bars)


def test_the_picture_says_in_words_what_it_shows(panel, sim):
    hardest = 100 * analysis.decile_shares(sim)[-1]
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
