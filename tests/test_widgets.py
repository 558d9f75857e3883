"""The ablation panel: what a moved control changes, and that it shows what the module computes."""

import re

import pytest
import torch

from fcse.losses import focal_info_nce, info_nce
from fcse.widgets import AblationPanel


@pytest.fixture
def sim():
    matrix = torch.rand(32, 32, generator=torch.Generator().manual_seed(1)) * 0.7
    return matrix.fill_diagonal_(0.9)


def shown_losses(panel):
    return [float(x) for x in re.findall(r"(?:InfoNCE|modulated) (\d+\.\d+)", panel._facts.value)]


@pytest.mark.parametrize(("control", "value"), [("temperature", 0.2), ("m", 0.8)])
def test_moving_a_slider_draws_another_picture(sim, control, value):
    panel = AblationPanel(sim)
    before = panel.png
    getattr(panel, control).value = value
    assert panel.png != before
    assert panel.png.startswith(b"\x89PNG")


def test_the_losses_shown_are_those_of_the_module(sim):
    panel = AblationPanel(sim)
    panel.temperature.value, panel.m.value, panel.modulate.value = 0.1, 0.5, "negative"
    plain, modulated = shown_losses(panel)
    assert plain == pytest.approx(info_nce(sim, 0.1).item(), abs=1e-4)
    assert modulated == pytest.approx(focal_info_nce(sim, 0.1, 0.5, "negative").item(), abs=1e-4)
    assert "-0.250" in panel._facts.value


def test_without_modulation_both_losses_agree(sim):
    panel = AblationPanel(sim)
    pictures = {panel.png}
    for modulate in ("positive", "negative", "none"):
        panel.modulate.value = modulate
        pictures.add(panel.png)
    plain, modulated = shown_losses(panel)
    assert plain == modulated
    assert "resting point" not in panel._facts.value
    assert len(pictures) == 4


def test_going_back_draws_the_same_picture(sim):
    panel = AblationPanel(sim)
    before = panel.png
    panel.m.value = 0.9
    panel.m.value = 0.3
    assert panel.png == before
