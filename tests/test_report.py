"""Runs side by side: what is read, what is scored once, and what is compared with what."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fcse import published
from fcse.config import TrainConfig
from fcse.data import STS_TASKS, load_lee
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError
from fcse.evaluation import judge
from fcse.report import beside_published, load_runs, over_seeds, score_runs
from fcse.statistics import compare_seeds
from fcse.training import train


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
    train(replace(config, modulate="positive", recipe="half", output=str(root / "half")))
    shutil.copytree(root / "half", root / "interrupted")
    record = json.loads((root / "half/run.json").read_text())
    (root / "interrupted/run.json").write_text(json.dumps(record | {"finished": False}))
    return root


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "runs")


def test_finished_runs_are_listed_with_what_was_on(folder):
    runs = load_runs(folder).set_index(["objective", "seed"])
    assert sorted(runs.index) == [
        ("focal_info_nce", 0),
        ("focal_info_nce", 1),
        ("info_nce", 0),
        ("info_nce", 1),
        ("positive", 0),
    ]
    assert runs.loc[("positive", 0), "folder"] == folder / "half"
    assert set(runs["settings"]) == {""}
    assert load_runs(folder, "half")["objective"].tolist() == ["positive"]


def test_one_run_is_a_folder_of_runs_too(folder):
    assert load_runs(folder / "half")["folder"].tolist() == [folder / "half"]


def test_settings_name_what_differs(folder):
    path = folder / "half/run.json"
    record = json.loads(path.read_text())
    record["config"]["temperature"] = 0.1
    path.write_text(json.dumps(record))
    runs = load_runs(folder).set_index("objective")
    assert runs.loc["positive", "settings"] == "temperature 0.1"
    assert set(runs.loc["info_nce", "settings"]) == {"temperature 0.05"}


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
            "objective": ["info_nce"] * 3 + ["focal_info_nce"] * 3 + ["positive"],
            "seed": [0, 1, 2, 1, 2, 3, 0],
            "score": [10.0, 20.0, 31.0, 21.0, 33.0, 99.0, 12.0],
        }
    )
    summary = over_seeds(table).set_index("objective")
    gain = summary.loc["focal_info_nce", "gain"]
    assert gain == compare_seeds([20.0, 31.0], [21.0, 33.0])
    assert (gain.n, gain.difference) == (2, 1.5)
    assert summary.loc["info_nce", "gain"] is None
    assert summary.loc["positive", "gain"] is None
    assert np.isnan(summary.loc["positive", "low"])
    assert summary["seeds"].tolist() == [3, 3, 1]
    assert summary.loc["info_nce", "mean"] == pytest.approx(61 / 3)


def test_settings_are_never_mixed():
    table = pd.DataFrame(
        {
            "settings": ["a", "a", "b", "b"],
            "task": "A",
            "objective": ["info_nce", "info_nce", "focal_info_nce", "focal_info_nce"],
            "seed": [0, 1, 0, 1],
            "score": [1.0, 2.0, 3.0, 4.0],
        }
    )
    assert over_seeds(table)["gain"].tolist() == [None, None]


def test_published_scores_against_seed_noise(tmp_path):
    points = beside_published().set_index(["backbone", "objective"])
    assert len(points) == 8
    noise = published.SIMCSE_50_SEEDS["roberta-base"]
    expected = (77.58 - noise["mean"]) / noise["sd"]
    assert points.loc[("roberta-base", "focal_info_nce"), "z"] == pytest.approx(expected)
    mine = {"objective": "info_nce", "task": "avg", "score": noise["mean"] - noise["sd"]}
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
