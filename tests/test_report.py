"""Runs side by side: what is read, what is scored once, and what is compared with what."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import one_line_refusal

from fcse.config import TrainConfig
from fcse.data import STS_TASKS, load_lee
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError
from fcse.evaluation import judge
from fcse.objectives import FocalInfoNCE
from fcse.statistics import compare_seeds
from fcse.study import published
from fcse.study.report import beside_published, load_runs, over_seeds, score_runs
from fcse.training import train

HALF = "Focal-InfoNCE (modulate=positive)"


@pytest.fixture(scope="module")
def trained(tiny_model, small_corpus, tmp_path_factory):
    """A folder with two seeds of each loss, one half of the modulation, and an interrupted run."""
    root = tmp_path_factory.mktemp("runs")
    config = TrainConfig(
        encoder=str(tiny_model("bert")),
        corpus=str(small_corpus),
        batch_size=8,
        steps=2,
        learning_rate=1e-3,
        max_length=16,
        pooling="mean",
    )
    for objective in ("info_nce", "focal_info_nce"):
        for seed in (0, 1):
            output = root / f"{objective}-{seed}"
            train(replace(config, objective=objective, seed=seed, output=str(output)))
    half = replace(config, objective=FocalInfoNCE(modulate="positive"), recipe="half")
    train(replace(half, output=str(root / "half")))
    shutil.copytree(root / "half", root / "interrupted")
    record = json.loads((root / "half/run.json").read_text())
    (root / "interrupted/run.json").write_text(json.dumps(record | {"finished": False}))
    return root


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs")


def test_finished_runs_are_listed_with_what_was_on(folder):
    runs = load_runs(folder).set_index(["name", "seed"])
    assert runs.index.tolist() == [
        ("InfoNCE", 0),
        ("InfoNCE", 1),
        ("Focal-InfoNCE", 0),
        ("Focal-InfoNCE", 1),
        (HALF, 0),
    ]
    assert runs.loc[(HALF, 0), "folder"] == folder / "half"
    assert set(runs["settings"]) == {""}
    assert load_runs(folder, "half")["name"].tolist() == [HALF]


def test_one_run_is_a_folder_of_runs_too(folder):
    assert load_runs(folder / "half")["folder"].tolist() == [folder / "half"]


def rewrite(path, **changes):
    record = json.loads(path.read_text())
    record["config"] |= changes
    path.write_text(json.dumps(record))


def test_settings_name_what_differs_beside_the_loss(folder):
    rewrite(folder / "half/run.json", learning_rate=0.1, temperature=0.2)
    runs = load_runs(folder).set_index("name")
    assert runs.loc["Focal-InfoNCE (temperature=0.2, modulate=positive)", "settings"] == (
        "learning_rate 0.1"
    )
    assert set(runs.loc["InfoNCE", "settings"]) == {"learning_rate 0.001"}


def test_losses_that_differ_in_a_method_alone_are_two_rows(folder):
    for seed, layers in ((0, 1), (1, 2)):
        path = folder / f"info_nce-{seed}/run.json"
        rewrite(path, objective="info_nce+sscl", **{"sscl.layers": layers})
    runs = load_runs(folder)
    assert runs["name"].tolist()[-2:] == ["InfoNCE + SSCL", "InfoNCE + SSCL (layers=1)"]
    assert set(runs["settings"]) == {""}
    summary = over_seeds(runs.assign(task="A", score=range(5)))
    assert summary.set_index("name")["seeds"].to_dict() == {
        **{"Focal-InfoNCE": 2, HALF: 1},
        **{"InfoNCE + SSCL": 1, "InfoNCE + SSCL (layers=1)": 1},
    }


def test_a_record_of_another_version_is_refused_in_one_line(folder):
    rewrite(folder / "half/run.json", layers=None)
    with one_line_refusal("half/run.json is no record of a run that this version reads: delete"):
        load_runs(folder)


def test_scores_are_those_of_the_kept_model_and_are_kept(folder):
    lee = load_lee()
    runs = load_runs(folder)
    scores = score_runs(runs, [lee]).set_index("folder")
    for path in runs["folder"]:
        assert scores.loc[path, "task"] == "Lee"
        encoder = SentenceEncoder.from_pretrained(path / "model", "mean")
        assert scores.loc[path, "score"] == pytest.approx(judge(encoder, lee)["spearman"])
        shutil.rmtree(path / "model")
    pd.testing.assert_frame_equal(score_runs(runs, [lee]).set_index("folder"), scores)


def test_the_mean_of_seven_tasks_needs_all_seven(folder):
    runs = load_runs(folder / "half")
    lee = load_lee()
    seven = [replace(lee, name=name) for name in STS_TASKS]
    scores = score_runs(runs, [lee, *seven]).set_index("task")["score"]
    assert scores["avg"] == pytest.approx(scores[list(STS_TASKS)].mean())
    assert "avg" not in score_runs(runs, [lee, *seven[:-1]])["task"].tolist()


def test_gains_are_paired_over_common_seeds():
    table = pd.DataFrame(
        {
            "settings": "",
            "task": "A",
            "name": ["InfoNCE"] * 3 + ["Focal-InfoNCE"] * 3 + [HALF],
            "seed": [0, 1, 2, 1, 2, 3, 0],
            "score": [10.0, 20.0, 31.0, 21.0, 33.0, 99.0, 12.0],
        }
    )
    summary = over_seeds(table).set_index("name")
    gain = summary.loc["Focal-InfoNCE", "gain"]
    assert gain == compare_seeds([20.0, 31.0], [21.0, 33.0])
    assert (gain.n, gain.difference) == (2, 1.5)
    assert summary.loc["InfoNCE", "gain"] is None
    assert summary.loc[HALF, "gain"] is None
    assert np.isnan(summary.loc[HALF, "low"])
    assert summary["seeds"].tolist() == [3, 3, 1]
    assert summary.loc["InfoNCE", "mean"] == pytest.approx(61 / 3)


def test_settings_are_never_mixed():
    table = pd.DataFrame(
        {
            "settings": ["a", "a", "b", "b"],
            "task": "A",
            "name": ["InfoNCE", "InfoNCE", "Focal-InfoNCE", "Focal-InfoNCE"],
            "seed": [0, 1, 0, 1],
            "score": [1.0, 2.0, 3.0, 4.0],
        }
    )
    assert over_seeds(table)["gain"].tolist() == [None, None]


def test_published_scores_against_seed_noise(tmp_path):
    points = beside_published().set_index(["backbone", "name"])
    assert len(points) == 8
    noise = published.SIMCSE_50_SEEDS["roberta-base"]
    expected = (77.58 - noise["mean"]) / noise["sd"]
    assert points.loc[("roberta-base", "Focal-InfoNCE"), "z"] == pytest.approx(expected)
    mine = {"name": "InfoNCE", "task": "avg", "score": noise["mean"] - noise["sd"]}
    rows = [
        {"folder": tmp_path / "a", "encoder": "/models/roberta-base", **mine},
        {"folder": tmp_path / "b", "encoder": "minilm", **mine},
    ]
    added = beside_published(pd.DataFrame(rows)).set_index("source")
    assert added.loc["a", "z"] == pytest.approx(-1)
    assert added.loc["a", "backbone"] == "roberta-base"
    assert np.isnan(added.loc["b", "z"])


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"finished": true}', "\x00"])
def test_a_record_that_is_none_is_named(content, folder):
    (folder / "half/run.json").write_text(content)
    with pytest.raises(InputError, match=r"half/run\.json is no record"):
        load_runs(folder)


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(InputError, match="no folder of runs"):
        load_runs(tmp_path / "none")
    with pytest.raises(InputError, match="holds no finished run"):
        load_runs(tmp_path)


def test_broken_scores_are_named(folder):
    (folder / "half/scores.json").write_text("{")
    with pytest.raises(InputError, match=r"scores\.json is no valid JSON"):
        score_runs(load_runs(folder / "half"), [load_lee()])
