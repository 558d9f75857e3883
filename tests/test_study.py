"""The embedded study from its command to its figures, and what a notebook looks at."""

import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from conftest import lee_score
from PIL import Image

from fcse.cli import main
from fcse.data import load_lee
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError
from fcse.objectives import FocalInfoNCE
from fcse.recipes import RECIPES
from fcse.study.embedded import pick_runs, study
from fcse.training import load_run, train

REPOSITORY = Path(__file__).parents[1]
FIGURES = (
    *("scores", "training", "alignment_uniformity"),
    *("pull_curves", "pull_by_decile", "published"),
)


@pytest.fixture
def tiny_study(tiny_config, tmp_path, monkeypatch):
    """What the study trains, at a tiny size; its runs in a folder of their own."""
    monkeypatch.setenv("FCSE_RUNS", str(tmp_path / "runs"))
    config = replace(tiny_config("-"), output=None, recipe="minilm-wiki")
    monkeypatch.setitem(RECIPES, "minilm-wiki", config)
    return config


def listing(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.usefixtures("no_sts_data")
def test_make_study_trains_scores_and_draws_once_and_writes_beside_the_runs_alone(
    tiny_study, tmp_path, monkeypatch, capsys
):
    assert "$(BIN)/fcse study\n" in (REPOSITORY / "Makefile").read_text()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    shown = listing(REPOSITORY / "figures")

    main(["study"])
    out = capsys.readouterr().out
    folder = tmp_path / "runs/study"
    assert f"figures: {folder}/" in out
    kinds = ("png", "svg", "csv")
    assert {*folder.iterdir()} == {folder / f"{name}.{kind}" for name in FIGURES for kind in kinds}
    for name in FIGURES:
        assert "InfoNCE" in Image.open(folder / f"{name}.png").info["Description"]
        assert len(pd.read_csv(folder / f"{name}.csv"))

    table = pd.read_csv(folder / "scores.csv")
    assert list(table["encoder"]) == ["untrained", "InfoNCE", "Focal-InfoNCE"]
    assert set(table["task"]) == {"Lee"}
    assert table.notna().all(axis=None)
    by_hand = [load_run(replace(tiny_study, objective="info_nce")).encoder_at(0)]
    by_hand += [
        load_run(replace(tiny_study, objective=objective)).encoder
        for objective in ("info_nce", "focal_info_nce")
    ]
    assert table["score"].tolist() == pytest.approx([*map(lee_score, by_hand)], abs=1e-3)
    printed = dict(re.findall(r"^(\S+) +(-?\d+\.?\d*)$", out, re.MULTILINE))
    assert list(printed) == list(table["encoder"])
    assert table["score"].tolist() == pytest.approx([*map(float, printed.values())], abs=0.006)

    before, drawn = listing(tmp_path / "runs"), {x: x.read_bytes() for x in folder.iterdir()}
    main(["study"])
    now = listing(tmp_path / "runs")
    assert {x: t for x, t in now.items() if x.parent != folder} == {
        x: t for x, t in before.items() if x.parent != folder
    }
    assert {x: x.read_bytes() for x in folder.iterdir()} == drawn

    assert not [*here.iterdir()]
    assert listing(REPOSITORY / "figures") == shown


def test_with_sts_data_the_study_scores_both_splits_too(tiny_study, tmp_path, monkeypatch):
    lee, sts = load_lee(), tmp_path / "senteval/STS/STSBenchmark"
    sts.mkdir(parents=True)
    lines = [
        f"g\tlee\t2005\t{i}\t{5 * gold}\t{' '.join(left.split())}\t{' '.join(right.split())}\n"
        for i, (left, right, gold) in enumerate(zip(lee.left, lee.right, lee.gold, strict=True))
    ]
    (sts / "sts-dev.csv").write_text("".join(lines[:200]))
    (sts / "sts-test.csv").write_text("".join(lines))
    monkeypatch.setenv("FCSE_SENTEVAL", str(tmp_path / "senteval"))
    table, folder = study(tiny_study, tmp_path / "mine")
    assert folder == tmp_path / "mine"
    assert not (tmp_path / "runs/study").exists()
    wide = table.pivot(index="encoder", columns="task", values="score")
    assert set(wide.index) == {"untrained", "InfoNCE", "Focal-InfoNCE"}
    assert set(wide) == {"Lee", "STS-B dev", "STS-B test"}
    assert wide["STS-B test"].tolist() == pytest.approx(wide["Lee"].tolist(), abs=1e-3)
    assert (wide["STS-B dev"] != wide["Lee"]).all()


def test_a_run_folder_is_picked(tiny_config, tmp_path):
    half = FocalInfoNCE(modulate="positive")
    trained = train(tiny_config(tmp_path / "run", steps=2, objective=half))
    ((name, picked),) = pick_runs(tmp_path / "run").items()
    assert name == "Focal-InfoNCE (modulate=positive)"
    assert picked.losses == trained.losses


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_encoder_stands_for_a_run_of_no_steps(pooling, tiny_model, tmp_path):
    SentenceEncoder.from_pretrained(tiny_model("bert"), pooling).save_pretrained(tmp_path)
    (key, run), *rest = pick_runs(tmp_path).items()
    assert (key, rest) == ("chosen encoder", [])
    assert run.steps == [0]
    assert run.losses == []
    assert run.encoder.pooling == run.config.pooling == pooling
    assert run.evaluations[0]["lee"] == pytest.approx(lee_score(run.encoder))


@pytest.mark.usefixtures("no_sts_data")
def test_what_is_nowhere_is_refused(tmp_path):
    for source in ("no-such-model", tmp_path / "none"):
        with pytest.raises(InputError, match="could not be loaded"):
            pick_runs(source)
