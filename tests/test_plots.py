"""Figures: labelled axes, and files that hold the numbers drawn."""

import colorsys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from fcse import analysis, plots
from fcse.objectives import VARIANTS
from fcse.objectives import name as name_of
from fcse.plots.style import METHODS, STYLES
from fcse.study.findings import contrasts, means
from fcse.study.published import SIMCSE_50_SEEDS
from fcse.study.report import beside_published, over_seeds

SIM = torch.rand(20, 20, generator=torch.Generator().manual_seed(0)).fill_diagonal_(0.9)
STEPS = pd.DataFrame(
    {
        "name": ["InfoNCE"] * 3 + ["Focal-InfoNCE"] * 3,
        "step": [0, 1, 2] * 2,
        "loss": [3.0, 2.0, 1.0, 2.5, 1.5, 0.5],
        "lee": [40.0, 45.0, 50.0, 40.0, 46.0, 51.0],
        "alignment": [0.1, 0.2, 0.3, 0.1, 0.15, 0.2],
        "uniformity": [-1.0, -2.0, -2.5, -1.0, -1.8, -2.2],
    }
)
SCORES = pd.DataFrame(
    {"encoder": ["untrained", "InfoNCE"] * 2, "task": ["A", "A", "B", "B"], "score": [1, 2, 3, 4]}
)
SEEDS = pd.DataFrame(
    {
        "settings": "",
        "task": "A",
        "name": ["InfoNCE", "InfoNCE", "Focal-InfoNCE", "Focal-InfoNCE"],
        "seed": [0, 1, 0, 1],
        "score": [1.0, 2.0, 2.0, 4.0],
    }
)
RUN = pd.DataFrame(
    {
        "folder": [Path("mine")],
        "encoder": ["roberta-base"],
        "name": ["InfoNCE"],
        "task": ["avg"],
        "score": [75.5],
    }
)
GAINS = pd.DataFrame(
    [
        (score, corpus, baseline, loss, gain + 0.1 * shift, gain - 0.4, gain + 0.6)
        for score in ("avg", "Lee")
        for shift, corpus in enumerate(("wiki-mini", "other.txt"))
        for baseline, loss, gain in (
            ("InfoNCE", "Focal-InfoNCE", 0.5),
            ("InfoNCE", "InfoNCE (temperature=0.03)", -0.25),
            ("Focal-InfoNCE", "Focal-InfoNCE + SSCL", 1.0),
        )
    ],
    columns=["score", "corpus", "baseline", "contestant", "difference", "low", "high"],
)
TAUS, SHIFTS = (0.03, 0.05, 0.055, 0.1), (0.0, 0.3)
SURFACE = pd.DataFrame(
    [("info_nce", tau, np.nan, 70 - 20 * tau) for tau in TAUS]
    + [("focal_info_nce", tau, m, 70 + 30 * tau - 5 * m) for tau in TAUS[:3] for m in SHIFTS],
    columns=["objective", "temperature", "m", "score"],
)
RATES = pd.DataFrame(
    [
        (loss, rate, score, score - 1, score + 2)
        for loss, scores in (("InfoNCE", (70.5, 71)), ("Focal-InfoNCE", (72, 71.25)))
        for rate, score in zip((3e-5, 1e-4), scores, strict=True)
    ],
    columns=["contestant", "learning_rate", "score", "low", "high"],
)
BY_LENGTH = pd.DataFrame(
    [
        (score, steps, baseline, loss, gain, gain - 0.2, gain + 0.3)
        for score in ("avg", "Lee")
        for steps, scale in ((25, 1), (100, 0.5))
        for baseline, loss, gain in (
            ("InfoNCE", "Focal-InfoNCE", 0.8 * scale),
            ("InfoNCE (tuned)", "Focal-InfoNCE", 0.25 * scale),
        )
    ],
    columns=["score", "steps", "baseline", "contestant", "difference", "low", "high"],
)
BEST = pd.DataFrame({"contestant": "InfoNCE", "steps": [25, 100], "temperature": [0.025, 0.05]})
ALONG = pd.DataFrame(
    [
        (loss, seed, step, 0.05 - 0.001 * step - 0.01 * seed, 0.4 + 0.01 * step, 0.01 * step, 0.25)
        for loss in ("InfoNCE", "Focal-InfoNCE + AdapACSE")
        for seed in (0, 1)
        for step in (0, 5, 10)
    ],
    columns=["contestant", "seed", "step", *plots.seeds.ALONG],
)
FIGURES = {
    "gains": lambda: plots.gains(GAINS, "tiny, 8 sentences"),
    "surface": lambda: plots.surface(SURFACE, "tiny, 8 sentences"),
    "by_setting": lambda: plots.by_setting(RATES, "learning_rate", "peak rate", "tiny, 2 seeds"),
    "differences": lambda: plots.differences(BY_LENGTH, "steps", "length [steps]", "tiny", BEST),
    "along_training": lambda: plots.along_training(ALONG),
    "over_seeds": lambda: plots.over_seeds(SEEDS, over_seeds(SEEDS)),
    "beside_published": lambda: plots.beside_published(beside_published(RUN), SIMCSE_50_SEEDS),
    "scores": lambda: plots.scores(SCORES),
    "training": lambda: plots.training(STEPS, STEPS),
    "plane": lambda: plots.plane(STEPS),
    "lines": lambda: plots.lines(STEPS, "step", {"lee": "Lee", "alignment": "alignment"}, "step"),
    "pull_curves": lambda: plots.pull_curves(analysis.curves()),
    "curve_families": lambda: plots.curve_families({"m": {0.3: analysis.curve("focal_info_nce")}}),
    "pull_by_decile": lambda: plots.pull_by_decile(analysis.pull_by_decile(SIM)),
    "joined": lambda: plots.joined("InfoNCE + SSCL", {"a": SIM[0].numpy()}, {"b": SIM[1].numpy()}),
    "against": lambda: plots.against("InfoNCE + IFND", SIM[0].numpy(), SIM[1].numpy(), "s", "t"),
    "similarity_heatmap": lambda: plots.similarity_heatmap({"a": SIM.numpy()}, "cosine"),
    "similarity_distribution": lambda: plots.similarity_distribution(
        pd.DataFrame({"encoder": "InfoNCE", "kind": "all", "similarity": SIM.flatten().numpy()})
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
    pairs = all(" − " in label.get_text() for label in drawn[0].get_yticklabels())
    assert drawn[0].get_ylabel() or pairs
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


def test_losses_differ_in_colour_and_in_lightness_or_mark():
    for styles in (STYLES, METHODS):
        colours = np.array([to_rgb(style.colour) for style in styles.values()])
        distance = np.abs(colours[:, None] - colours[None]).sum(-1) + 10 * np.eye(len(colours))
        assert distance.min() > 0.3
    every = STYLES | METHODS
    assert len({style.marker for style in every.values()}) == len(every)
    assert len({style.colour for style in every.values()}) == len(every)
    assert {*map(name_of, VARIANTS)} <= {*STYLES}


def test_a_known_loss_has_its_style_and_keeps_its_colour_with_other_parameters():
    for objective in VARIANTS:
        assert plots.style(name_of(objective)) is STYLES[name_of(objective)]
    plain, focal = plots.style("InfoNCE"), plots.style("Focal-InfoNCE")
    assert plots.style("InfoNCE (temperature=0.025)") == plain
    assert plots.style("Focal-InfoNCE (temperature=0.1, m=0.7)") == focal
    assert plots.style("Hardness-InfoNCE (alpha=1.0)") == plots.style("Hardness-InfoNCE")
    assert len({plain, focal, plots.style("Hardness-InfoNCE")}) == 3
    assert plots.line("InfoNCE (temperature=0.025)") == {
        "color": plain.colour,
        "linestyle": plain.dash,
        "label": "InfoNCE (temperature=0.025)",
    }


def test_a_loss_with_a_method_has_the_method_s_style_and_with_several_it_is_black():
    for method, style in METHODS.items():
        for loss in (f"InfoNCE + {method}", f"Focal-InfoNCE (m=0.1) + {method} (a=2, b=None)"):
            assert plots.style(loss) is style
    several = plots.style("Focal-InfoNCE + CARDS (neighbours=4) + SSCL")
    assert several == plots.style("InfoNCE + AdapACSE + IFND + SSCL")
    assert to_rgb(several.colour) == (0, 0, 0)
    assert several not in METHODS.values()


def test_a_reader_s_own_loss_or_method_has_one_style_by_its_name():
    mine = plots.style("Mine")
    assert mine == plots.style("Mine (margin=0.1)") == ("#994455", "^", (0, (3, 1)))  # as ever
    assert mine.colour not in {style.colour for style in (STYLES | METHODS).values()}
    assert plots.style("InfoNCE + Queue (size=64)") == plots.style("Focal-InfoNCE + Queue")
    names = [f"Loss{letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
    assert len({plots.style(loss).colour for loss in names}) == 8
    assert "Loss" not in " ".join(STYLES)


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


def bars(axes):
    """((low, high), y) of each horizontal interval."""
    found = [c.get_segments()[0] for c in axes.collections if hasattr(c, "get_segments")]
    return [((*x[:, 0],), x[0, 1]) for x in found]


def test_gains_are_drawn_with_their_intervals_in_the_line_of_their_pair():
    figure = FIGURES["gains"]()
    left, right = figure.axes
    assert left.get_title() == "mean of the seven STS tasks"
    assert right.get_title() == "Lee"
    labels = ["Focal-InfoNCE − InfoNCE", "InfoNCE (temperature=0.03) − InfoNCE"]
    labels.append("Focal-InfoNCE + SSCL − Focal-InfoNCE")
    assert [tick.get_text() for tick in left.get_yticklabels()] == labels
    for axes, score in ((left, "avg"), (right, "Lee")):
        rows = GAINS[GAINS["score"] == score].reset_index(drop=True)
        drawn = [container for container in axes.containers if container.has_xerr]
        assert len(drawn) == len(rows)
        for row, container, (span, y) in zip(rows.itertuples(), drawn, bars(axes), strict=True):
            point = container.lines[0]
            assert point.get_xdata() == [row.difference]
            assert span == pytest.approx((row.low, row.high))
            assert round(y) == row.Index % 3
            assert point.get_color() == plots.style(row.contestant).colour
            assert point.get_marker() == plots.style(row.contestant).marker
            hollow = to_hex(point.get_markerfacecolor()) == "#ffffff"
            assert hollow == (row.contestant == "InfoNCE (temperature=0.03)")
        assert len({y for _, y in bars(axes)}) == len(rows), "one interval hides another"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["wiki-mini", "other.txt"]
    alt = figure.alt
    assert alt.startswith("tiny, 8 sentences. avg, wiki-mini, Focal-InfoNCE minus InfoNCE: +0.50, ")
    assert "Lee, other.txt, Focal-InfoNCE + SSCL minus Focal-InfoNCE: +1.10, interval +0.60" in alt
    assert alt.count("interval") == len(GAINS)


def test_contrasts_of_real_rows_are_drawn():
    rows = [
        {"contestant": loss, "seed": seed, "corpus": "c", "Lee": 50 + (seed - 1) * lift}
        for loss, lift in (("InfoNCE", 0), ("Focal-InfoNCE", 1), ("Mine (a=2)", 2))
        for seed in range(4)
    ]
    figure = plots.gains(contrasts(pd.DataFrame(rows), ["Lee"]), "made")
    assert "Lee, c, Mine (a=2) minus InfoNCE: +1.00, interval" in figure.alt
    assert not figure.legends


def test_the_surface_is_a_map_of_focal_infonce_beside_the_curve_of_infonce():
    figure = FIGURES["surface"]()
    left, right = figure.axes[:2]
    focal = SURFACE[SURFACE["objective"] == "focal_info_nce"]
    grid = focal.pivot_table(index="m", columns="temperature", values="score")
    np.testing.assert_allclose(left.images[0].get_array(), grid)
    assert left.images[0].origin == "lower"
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["0.03", "0.05", "0.055"]
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["0", "0.3"]
    cells = {text.get_position(): text for text in left.texts}
    assert len(cells) == grid.size
    for (x, y), text in cells.items():
        value = grid.iloc[y, x]
        assert text.get_text() == f"{value:.1f}"
        rgb = left.images[0].to_rgba(value)[:3]
        lightness = [colorsys.rgb_to_hls(*c)[1] for c in (rgb, to_rgb(text.get_color()))]
        assert abs(lightness[0] - lightness[1]) > 0.35, "text on a ground of its own lightness"
    (plain,) = [line for line in right.lines if line.get_label() == "InfoNCE"]
    assert plain.get_color() == plots.style("InfoNCE").colour
    np.testing.assert_allclose(plain.get_xydata()[:, 1], [70 - 20 * tau for tau in TAUS])
    rows = [line for line in right.lines if line is not plain and len(line.get_xdata())]
    np.testing.assert_allclose([line.get_ydata() for line in rows], grid)
    assert {line.get_color() for line in rows} == {plots.style("Focal-InfoNCE").colour}
    assert [text.get_text() for text in right.texts] == ["m = 0", "m = 0.3"]
    assert figure.alt == (
        "tiny, 8 sentences. Focal-InfoNCE scores 69.4 to 71.7, best at temperature 0.055 and m 0. "
        "InfoNCE scores 68.0 to 69.4, best at temperature 0.03."
    )


def test_a_score_against_a_setting_has_a_line_a_loss_and_the_span_of_its_seeds():
    figure = FIGURES["by_setting"]()
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["3e-05", "0.0001"]
    losses = list(RATES.groupby("contestant", sort=False))
    for (loss, rows), line, span in zip(losses, axes.lines, axes.collections, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), rows[["learning_rate", "score"]])
        assert (line.get_color(), line.get_marker()) == plots.style(loss)[:2]
        assert to_hex(span.get_facecolor()[0]) == plots.style(loss).colour.lower()
        ends = span.get_paths()[0].get_extents()
        assert (ends.y0, ends.y1) == (rows["low"].min(), rows["high"].max())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [x for x, _ in losses]
    assert figure.alt == (
        "tiny, 2 seeds. InfoNCE: 70.5 at 3e-05, 71.0 at 0.0001. "
        "Focal-InfoNCE: 72.0 at 3e-05, 71.2 at 0.0001."
    )


def test_differences_against_a_setting_have_their_intervals_and_the_temperature_beside():
    figure = FIGURES["differences"]()
    *panels, last = figure.axes
    assert [axes.get_title() for axes in panels] == ["mean of the seven STS tasks", "Lee"]
    assert {axes.get_xscale() for axes in figure.axes} == {"log"}
    for axes, (_, rows) in zip(panels, BY_LENGTH.groupby("score", sort=False), strict=True):
        pairs = list(rows.groupby("baseline"))
        for (_, each), container in zip(pairs, axes.containers, strict=True):
            points, _, (bars_,) = container.lines
            assert list(points.get_xdata()) == pytest.approx(list(each["steps"]), rel=0.05)
            assert list(points.get_ydata()) == list(each["difference"])
            spans = [tuple(segment[:, 1]) for segment in bars_.get_segments()]
            expected = list(zip(each["low"], each["high"], strict=True))
            assert [pytest.approx(span) for span in expected] == spans
        first, second = (container.lines[0].get_xdata() for container in axes.containers)
        assert not {*first} & {*second}, "one interval hides another"
    (drawn,) = last.lines
    np.testing.assert_array_equal(drawn.get_xydata(), BEST[["steps", "temperature"]])
    assert drawn.get_color() == plots.style("InfoNCE").colour
    assert "avg, Focal-InfoNCE minus InfoNCE: +0.80 (+0.60 to +1.10) at 25, +0.40" in figure.alt
    assert figure.alt.endswith("Best temperature, InfoNCE: 0.025 at 25, 0.05 at 100.")


def test_means_of_real_rows_are_drawn_in_the_order_of_losses():
    rows = [
        {"contestant": loss, "batch_size": size, "seed": seed, "Lee": 50 + seed}
        for loss in ("Mine", "Focal-InfoNCE", "InfoNCE", "InfoNCE + SSCL")
        for size in (16, 64)
        for seed in (0, 1)
    ]
    table = means(pd.DataFrame(rows), ["batch_size"], "Lee")
    (axes,) = plots.by_setting(table, "batch_size", "batch size [sentences]", "made").axes
    order = ["InfoNCE", "Focal-InfoNCE", "InfoNCE + SSCL", "Mine"]
    assert [line.get_label() for line in axes.lines] == order
    assert all(list(line.get_ydata()) == [50.5, 50.5] for line in axes.lines)


def test_along_training_every_seed_has_a_line_and_each_loss_their_mean():
    figure = FIGURES["along_training"]()
    for axes, (column, label) in zip(figure.axes, plots.seeds.ALONG.items(), strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("training step", label)
        assert axes.get_ylim()[0] == 0
        factor = 100 if "%" in label else 1
        lines = iter(axes.lines)
        for loss, rows in ALONG.groupby("contestant", sort=False):
            by_step = factor * rows.pivot_table(index="step", columns="seed", values=column)
            *seeds, mean = (next(lines) for _ in range(3))
            np.testing.assert_allclose(np.transpose([x.get_ydata() for x in seeds]), by_step)
            np.testing.assert_allclose(mean.get_ydata(), by_step.mean(axis=1))
            np.testing.assert_array_equal(mean.get_xdata(), [0, 5, 10])
            assert {x.get_color() for x in (*seeds, mean)} == {plots.style(loss).colour}
            assert mean.get_label() == loss
            assert mean.get_linewidth() > seeds[0].get_linewidth()
    shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert shown == ["InfoNCE", "Focal-InfoNCE + AdapACSE"]
    assert "effective temperature, InfoNCE: 0.045 to 0.035." in figure.alt
    assert "pull on the hardest tenth [%], Focal-InfoNCE + AdapACSE: 40 to 50." in figure.alt


def tick_labels(axes, name):
    """Places in pixels, (k, 2), of the tick labels that are seen along an axis, in their order."""
    axis, side = (axes.xaxis, 0) if name == "x" else (axes.yaxis, 1)
    ticks = [t for t in axis.get_major_ticks() if t.label1.get_text() and t.label1.get_visible()]
    inside = [axes.bbox.extents[side] - 1, axes.bbox.extents[side + 2] + 1]
    boxes = [tick.label1.get_window_extent() for tick in ticks]
    centres = [(box.x0 + box.x1, box.y0 + box.y1)[side] / 2 for box in boxes]
    seen = [b for b, c in zip(boxes, centres, strict=True) if inside[0] <= c <= inside[1]]
    return np.sort([(box.extents[side], box.extents[side + 2]) for box in seen], axis=0)


@pytest.mark.parametrize("name", [x for x in FIGURES if x != "scores"])  # its labels are rotated
def test_ticks_are_legible(name):
    figure = FIGURES[name]()
    figure.draw_without_rendering()
    for axes in figure.axes:
        for direction in "xy":
            places = tick_labels(axes, direction)
            if len(places):
                assert (places[1:, 0] > places[:-1, 1]).all(), "one label overlaps the next"
                assert min(t.get_fontsize() for t in axes.get_xticklabels()) >= 8
    drawn = [axes for axes in figure.axes if axes.get_label() != "<colorbar>" and name != "maps"]
    assert all(len(tick_labels(axes, "x")) >= 2 for axes in drawn)


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
