"""The explorers: every control changes what is shown, and what is shown is what the module says."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_rgba

from fcse import analysis, losses, plots
from fcse.data import article_batch, load_wiki_articles
from fcse.objectives import VARIANTS, FocalInfoNCE, HardnessInfoNCE, InfoNCE
from fcse.study.embedded import trajectories, with_untrained
from fcse.training import train
from fcse.widgets import MapExplorer, NegativeExplorer, TrajectoryPlane
from fcse.widgets.negatives import compared


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_config):
    """A tiny model trained with both losses, with weights of steps 0, 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("runs")
    settings = {"max_length": 32, "eval_steps": 2, "learning_rate": 1e-2, "checkpoints": True}
    configs = [
        tiny_config(folder / objective, objective=objective, **settings)
        for objective in ("info_nce", "focal_info_nce")
    ]
    return {config.name: train(config) for config in configs}


@pytest.fixture(scope="module")
def batch():
    return article_batch(load_wiki_articles(), size=32)


@pytest.fixture
def explorer(runs, batch):
    return NegativeExplorer(runs, *batch)


def shown(explorer):
    """The text of the cells of the first table, row by row."""
    first = explorer._tables.value.split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", first)[1:]
    return [re.findall(r"<td[^>]*>(?:<b>)?(.*?)(?:</b>)?</td>", row) for row in rows]


@pytest.mark.parametrize(
    ("control", "value"), [("anchor", 5), ("step", 4), ("run", "Focal-InfoNCE")]
)
def test_every_control_of_the_negatives_changes_what_is_shown(explorer, control, value):
    explorer.step.value = 2
    before, table = explorer._tables.value, explorer.table
    getattr(explorer, control).value = value
    assert explorer._tables.value != before
    assert not explorer.table.equals(table)


def test_the_steps_are_those_of_the_run(explorer, runs):
    assert list(explorer.step.options) == runs["InfoNCE"].steps == [0, 2, 4, 6]
    explorer.step.value = 4
    explorer.run.value = "Focal-InfoNCE"
    assert explorer.step.value == 4


def test_the_table_holds_the_numbers_of_the_losses(explorer, runs, batch):
    explorer.step.value, explorer.anchor.value = 6, 9
    sentences, titles = batch
    sim = analysis.batch_similarities(runs["InfoNCE"].encoder, sentences)
    x = sim.clone().requires_grad_()
    for name, loss in (
        ("InfoNCE", losses.info_nce(x)),
        ("Focal-InfoNCE", losses.focal_info_nce(x)),
        ("Hardness-InfoNCE", losses.hardness_info_nce(x)),
    ):
        (gradient,) = torch.autograd.grad(len(sim) * loss, x)
        by_hand = gradient[9][torch.tensor(explorer.table["negative"])]
        np.testing.assert_allclose(explorer.table[name], by_hand, rtol=1e-4, atol=1e-7)
    rows = shown(explorer)
    share = explorer.table["InfoNCE"].abs() / explorer.table["InfoNCE"].abs().sum()
    for k, cells in enumerate(rows):
        row = explorer.table.iloc[k]
        assert cells[1] == f"{row['similarity']:.3f}"
        assert cells[2] == f"{row['InfoNCE']:.2g} ({100 * share[k]:.0f} %)"
        assert cells[5] == ("⚑ likely" if row["false_negative"] else "")
        assert row["sentence"] == sentences[row["negative"]]
        assert row["article"] == titles[row["negative"]]


def test_a_run_s_own_loss_stands_among_the_three_at_its_temperature(runs, batch):
    assert compared(InfoNCE(0.1)) == [InfoNCE(0.1), FocalInfoNCE(0.1), HardnessInfoNCE(0.1)]
    for own in VARIANTS:
        assert own in compared(own)
        assert len(compared(own)) == 3
    half = FocalInfoNCE(0.1, modulate="positive")
    run = runs["Focal-InfoNCE"]
    run = replace(run, config=replace(run.config, objective=half))
    table = NegativeExplorer({run.config.name: run}, *batch).table
    names = ["(temperature=0.1)", "(temperature=0.1, modulate=positive)", "(temperature=0.1)"]
    kinds = ("InfoNCE", "Focal-InfoNCE", "Hardness-InfoNCE")
    shown = [f"{kind} {name}" for kind, name in zip(kinds, names, strict=True)]
    assert list(table)[2:5] == shown
    by_hand = analysis.anchor_negatives(
        analysis.batch_similarities(run.encoder_at(0), batch[0]), 0, [half]
    )
    np.testing.assert_array_equal(table[shown[1]], by_hand[shown[1]])


def test_marks_and_list_agree(explorer, batch):
    pairs = explorer.pairs
    assert len(pairs)
    marked = set()
    for anchor in range(len(batch[0])):
        explorer.anchor.value = anchor
        table = explorer.table
        marked |= {(anchor, j) for j in table["negative"][table["false_negative"]]}
    both = {(i, j) for i, j in zip(pairs["i"], pairs["j"], strict=True)}
    assert marked == both | {(j, i) for i, j in both}
    assert f"{len(pairs)} likely false negatives" in explorer._tables.value


def test_text_is_shown_as_text(runs):
    explorer = NegativeExplorer(runs, ["a <b> c & d", "e", "f", "g"], ["<i>x"] * 4)
    assert "a &lt;b&gt; c &amp; d" in explorer._tables.value
    assert "<i>x" not in explorer._tables.value


def test_an_encoder_without_training_has_one_step(runs, batch):
    start = replace(runs["InfoNCE"], record={"kept_step": 0}, checkpoints={})
    explorer = NegativeExplorer({"chosen encoder": start}, *batch)
    assert list(explorer.step.options) == [0]
    assert list(with_untrained({"chosen encoder": start})) == ["chosen encoder"]
    assert list(with_untrained(runs)) == ["untrained", *runs]


N = 300
LABELS = ["a", "b", "c", "d", "e", "f"] * (N // 6)


@pytest.fixture
def maps():
    rng = np.random.default_rng(0)
    places = {"untrained": rng.normal(size=(N, 2)), "InfoNCE": rng.normal(size=(N, 2))}
    return MapExplorer(places, [f"sentence {i} <b>" for i in range(N)], LABELS, ["a", "b"])


@pytest.mark.parametrize(("chosen", "other"), [(0, 1), (1, 0)])
def test_selecting_in_one_map_selects_in_the_other(maps, chosen, other):
    scatters = list(maps.scatters.values())
    scatters[chosen].widget.selection = np.array([7, 3, 250], dtype="uint32")
    assert sorted(scatters[other].widget.selection) == [3, 7, 250]
    assert list(maps.selection) == [3, 7, 250]
    assert list(maps.selected["sentence"]) == [f"sentence {i} <b>" for i in (3, 7, 250)]
    assert "3 of 300 sentences selected" in maps._list.value
    assert "sentence 250 &lt;b&gt;" in maps._list.value
    scatters[chosen].widget.selection = None
    assert "0 of 300" in maps._list.value


def test_a_group_and_a_word_select(maps):
    maps.group.value = "b"
    assert set(maps.selected["article"]) == {"b"}
    assert len(maps.selection) == N // 6
    maps.group.value = plots.OTHERS
    assert set(maps.selected["article"]) == {"c", "d", "e", "f"}
    maps.word.value = "SENTENCE 29"
    assert list(maps.selection) == [29, *range(290, 300)]
    maps.word.value = ""
    assert len(maps.selection) == 0


def test_what_the_maps_show_stands_below_them_in_words(maps):
    texts = [child.value for child in maps.widget.children if hasattr(child, "value")]
    (said,) = [text for text in texts if text.startswith("Maps of the same 300 sentences")]
    for title, scatter in maps.scatters.items():
        xy = scatter.widget.data[["x", "y"]]
        spread = np.linalg.norm(xy - xy.mean(), axis=1)
        group = xy[scatter.widget.data["article"] == "a"]
        within = np.linalg.norm(group - group.mean(), axis=1)
        ratio = np.sqrt((within**2).mean() / (spread**2).mean())
        assert f"{title}: a {ratio:.2f}, b " in said


def test_points_carry_their_colour_and_lie_where_the_map_says(maps):
    for scatter in maps.scatters.values():
        points, data = scatter.widget.points, scatter.widget.data
        assert len(points) == N
        for column, axis in (("x", 0), ("y", 1)):
            correlation = np.corrcoef(points[:, axis], data[column])[0, 1]
            assert correlation == pytest.approx(1, abs=1e-6)
        assert list(data["group"].cat.categories) == [plots.OTHERS, "a", "b"]
        last = scatter.widget.point_order[-N // 3 :]
        assert set(data["article"].iloc[last]) == {"a", "b"}


def test_tens_of_thousands_of_points_are_no_burden():
    n = 30_000
    xy = np.random.default_rng(0).normal(size=(n, 2))
    explorer = MapExplorer({"one": xy, "two": -xy}, ["s"] * n, ["a", "b"] * (n // 2), ["a"])
    explorer.group.value = "a"
    one, two = explorer.scatters.values()
    assert len(one.widget.selection) == len(two.widget.selection) == n // 2
    assert len(explorer._list.value) < 10_000


def test_the_plane_shows_every_scoring_and_its_lines_move(runs):
    path = trajectories(runs)
    assert list(path.columns) == ["name", "step", "alignment", "uniformity", "score"]
    for name, run in runs.items():
        scored = pd.DataFrame(run.evaluations)
        rows = path[path["name"] == name]
        assert list(rows["step"]) == [0, 2, 4, 6]
        np.testing.assert_array_equal(rows["score"], scored["lee"])
        np.testing.assert_array_equal(rows["uniformity"], scored["lee_uniformity"])
    plane = TrajectoryPlane(path)
    said = plane.widget.children[3].value
    assert f"uniformity from {path['uniformity'].iloc[0]:.2f} to" in said
    shown = plane.scatter.widget
    assert len(shown.points) == len(path)
    colours = [to_rgba(plots.style(name).colour) for name in runs]
    np.testing.assert_allclose(shown.color, colours)
    np.testing.assert_allclose(shown.connection_color, colours)
    for weight in (1.0, 0.0):
        plane.weight.value = weight
        total = path["alignment"] + weight * path["uniformity"]
        assert f"{total.min():.3f}" in plane._facts.value
        best = path.loc[total.idxmin()]
        assert f"{best['name']} after step {best['step']}." in plane._facts.value
        for line in plane.scatter.annotations()["annotations"]:
            sums = [y + weight * x for x, y in line.vertices]
            assert sums[0] == pytest.approx(sums[1])
    lines = plane.scatter.widget.annotations
    plane.weight.value = 2.0
    assert plane.scatter.widget.annotations != lines
