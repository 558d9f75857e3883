"""Figures: labelled axes, and files that hold the numbers drawn."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb

from fcse import analysis, plots

SIM = torch.rand(20, 20, generator=torch.Generator().manual_seed(0)).fill_diagonal_(0.9)
STEPS = pd.DataFrame(
    {
        "run": ["info_nce"] * 3 + ["focal_info_nce"] * 3,
        "step": [0, 1, 2] * 2,
        "loss": [3.0, 2.0, 1.0, 2.5, 1.5, 0.5],
        "lee": [40.0, 45.0, 50.0, 40.0, 46.0, 51.0],
        "alignment": [0.1, 0.2, 0.3, 0.1, 0.15, 0.2],
        "uniformity": [-1.0, -2.0, -2.5, -1.0, -1.8, -2.2],
    }
)
SCORES = pd.DataFrame(
    {"encoder": ["untrained", "info_nce"] * 2, "task": ["A", "A", "B", "B"], "score": [1, 2, 3, 4]}
)
FIGURES = {
    "scores": lambda: plots.scores(SCORES),
    "training": lambda: plots.training(STEPS, STEPS),
    "plane": lambda: plots.plane(STEPS),
    "pull_curves": lambda: plots.pull_curves(analysis.curves(), 0.05, 0.3),
    "curve_families": lambda: plots.curve_families({"m": {0.3: analysis.curves()}}),
    "pull_by_decile": lambda: plots.pull_by_decile(analysis.pull_by_decile(SIM)),
    "similarity_heatmap": lambda: plots.similarity_heatmap({"a": SIM.numpy()}, "cosine", False),
    "similarity_distribution": lambda: plots.similarity_distribution(
        pd.DataFrame({"encoder": "info_nce", "kind": "all", "similarity": SIM.flatten().numpy()})
    ),
    "maps": lambda: plots.maps(
        pd.DataFrame({"encoder": "e", "x": [0, 1], "y": [1, 0], "group": ["a", "b"]}), ["a", "b"]
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_axes_are_labelled(name):
    figure = FIGURES[name]()
    drawn = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    assert drawn
    assert all(axes.get_xlabel() or axes.get_xticklabels() for axes in drawn)
    assert drawn[0].get_ylabel()
    assert all(axes.has_data() for axes in drawn)


def test_save_writes_picture_and_numbers(tmp_path):
    plots.save(FIGURES["plane"](), STEPS, tmp_path / "new" / "plane")
    assert (tmp_path / "new/plane.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "new/plane.svg").read_text()
    read = pd.read_csv(tmp_path / "new/plane.csv")
    pd.testing.assert_frame_equal(read, STEPS, check_dtype=False)


def test_the_same_numbers_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        plots.save(FIGURES["scores"](), SCORES, tmp_path / name)
    for suffix in (".png", ".svg", ".csv"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_objectives_differ_in_colour_and_in_lightness_or_mark():
    colours = np.array([to_rgb(c) for c in plots.COLOURS.values()])
    distance = np.abs(colours[:, None] - colours[None]).sum(-1) + 10 * np.eye(len(colours))
    assert distance.min() > 0.3
    assert len(set(plots._MARKERS.values())) == len(plots.COLOURS) == len(plots.NAMES)
