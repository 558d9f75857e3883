"""Figures: labelled axes, and files that hold the numbers drawn."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from fcse import analysis, plots
from fcse.published import SIMCSE_50_SEEDS
from fcse.report import beside_published, over_seeds

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
SEEDS = pd.DataFrame(
    {
        "settings": "",
        "task": "A",
        "objective": ["info_nce", "info_nce", "focal_info_nce", "focal_info_nce"],
        "seed": [0, 1, 0, 1],
        "score": [1.0, 2.0, 2.0, 4.0],
    }
)
RUN = pd.DataFrame(
    {
        "folder": [Path("mine")],
        "encoder": ["roberta-base"],
        "objective": ["info_nce"],
        "task": ["avg"],
        "score": [75.5],
    }
)
FIGURES = {
    "over_seeds": lambda: plots.over_seeds(SEEDS, over_seeds(SEEDS)),
    "beside_published": lambda: plots.beside_published(beside_published(RUN), SIMCSE_50_SEEDS),
    "scores": lambda: plots.scores(SCORES),
    "training": lambda: plots.training(STEPS, STEPS),
    "plane": lambda: plots.plane(STEPS),
    "pull_curves": lambda: plots.pull_curves(analysis.curves(), 0.05, 0.3),
    "curve_families": lambda: plots.curve_families({"m": {0.3: analysis.curves()}}),
    "pull_by_decile": lambda: plots.pull_by_decile(analysis.pull_by_decile(SIM)),
    "joined": lambda: plots.joined("sscl", {"a": SIM[0].numpy()}, {"b": SIM[1].numpy()}),
    "against": lambda: plots.against("ifnd", SIM[0].numpy(), SIM[1].numpy(), "s", "t"),
    "similarity_heatmap": lambda: plots.similarity_heatmap({"a": SIM.numpy()}, "cosine"),
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


def test_intervals_are_drawn_where_they_belong():
    summary = over_seeds(SEEDS)
    (axes,) = plots.over_seeds(SEEDS, summary).axes
    bars = [c.get_segments()[0][:, 1] for c in axes.collections if hasattr(c, "get_segments")]
    np.testing.assert_allclose(bars, summary[["low", "high"]])
    points = [c.get_offsets() for c in axes.collections if not hasattr(c, "get_segments")]
    np.testing.assert_allclose(np.sort(np.concatenate(points)[:, 1]), [1, 2, 2, 4])


def test_a_run_stands_in_the_row_of_its_backbone():
    points = beside_published(RUN)
    (axes,) = plots.beside_published(points, SIMCSE_50_SEEDS).axes
    rows = dict(zip([t.get_text() for t in axes.get_yticklabels()], axes.get_yticks(), strict=True))
    run = [line for line in axes.lines if list(line.get_xdata()) == [75.5]]
    assert [line.get_ydata()[0] for line in run] == [pytest.approx(rows["roberta-base"], abs=0.3)]


def test_lines_of_the_plane_join_equal_sums():
    (axes,) = plots.plane(STEPS).axes
    (contours,) = [c for c in axes.collections if hasattr(c, "levels")]
    drawn = [path.vertices.sum(axis=1) for path in contours.get_paths()]
    for level, sums in zip(contours.levels, drawn, strict=True):
        np.testing.assert_allclose(sums, level, atol=1e-6)
    assert sum(len(sums) > 0 for sums in drawn) >= 3


def test_sentences_of_no_group_are_drawn_grey():
    table = pd.DataFrame({"encoder": "e", "x": [0, 1, 2], "y": [1, 0, 2], "group": ["a", "b", "c"]})
    (axes,) = plots.maps(table, ["a", "b"]).axes
    grey = [c for c in axes.collections if c.get_label() == plots.OTHERS]
    np.testing.assert_array_equal(grey[0].get_offsets(), [[2, 2]])
    (axes,) = plots.maps(table, ["a", "b", "c"]).axes
    assert plots.OTHERS not in [c.get_label() for c in axes.collections]
    assert len(set(plots.group_colours("abcdefgh").values())) == 9


def test_what_is_left_out_of_a_matrix_is_blank_and_said():
    matrix = SIM.numpy().copy()
    matrix[1, 2] = matrix[3, 4] = np.nan
    alt = plots.similarity_heatmap({"whole": SIM.numpy(), "part": matrix}, "cosine").alt
    assert alt.endswith("2 cells left blank.")
    assert alt.count("blank") == 1
    assert "nan" not in alt


@pytest.mark.parametrize("name", FIGURES)
def test_a_picture_says_what_it_shows(name):
    alt = FIGURES[name]().alt
    assert len(alt.split(". ")) >= 2
    assert any(character.isdigit() for character in alt)
    assert "nan" not in alt


def test_the_text_alternative_holds_the_numbers_drawn():
    assert plots.scores(SCORES).alt.endswith(
        "A: untrained 1.0, InfoNCE 2.0. B: untrained 3.0, InfoNCE 4.0."
    )
    assert "A, Focal-InfoNCE: 2.0 to 4.0 over 2 seeds, mean 3.0." in FIGURES["over_seeds"]().alt
    assert "InfoNCE: loss from 3 to 1 over 3 steps." in FIGURES["training"]().alt
    assert "InfoNCE: uniformity from -1.00 to -2.50" in FIGURES["plane"]().alt
    assert "InfoNCE of a negative 20 to 20, of a positive 20 to 20" in FIGURES["pull_curves"]().alt
    assert "0.9 on the diagonal" in FIGURES["similarity_heatmap"]().alt


def test_files_carry_the_text_alternative(tmp_path):
    figure = FIGURES["plane"]()
    plots.save(figure, STEPS, tmp_path / "plane")
    assert Image.open(tmp_path / "plane.png").info["Description"] == figure.alt
    title = ElementTree.parse(tmp_path / "plane.svg").find("{http://www.w3.org/2000/svg}title")
    assert title.text == figure.alt
