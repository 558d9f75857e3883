"""A study's tables: what a row says, that it counts as done anywhere, that it can be made again."""

import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import one_line_refusal

from fcse import cli
from fcse.data import text_hash, versions
from fcse.study import workers
from fcse.study.grid import read_grid
from fcse.study.repeat import repeat
from fcse.study.tables import IDENTITY, config_of, current_rows, joined, read_rows, results
from fcse.study.workers import run_grid

GRID = """
batch_size = 4
steps = 2
max_length = 12
eval_steps = 2
precision = "float32"
seeds = {seeds}
[[runs]]
objective = "focal_info_nce"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory, small_corpus):
    """A grid of two seeds that was run: its TOML file with its table beside."""
    folder = tmp_path_factory.mktemp("made")
    path = folder / "study.toml"
    path.write_text(f'corpus = "{small_corpus}"' + GRID.format(seeds=[3, 5]))
    run_grid(read_grid(path, folder / "out"))
    shutil.copyfile(folder / "out/results.csv", folder / "study.csv")
    return path


@pytest.fixture
def elsewhere(made, small_corpus, tmp_path):
    """The same on another machine: TOML and table, no runs, the corpus at another place."""
    (tmp_path / "data").mkdir()
    corpus = shutil.copyfile(small_corpus, tmp_path / "data" / small_corpus.name)
    shutil.copyfile(made.with_suffix(".csv"), tmp_path / "study.csv")
    path = tmp_path / "study.toml"
    path.write_text(f'corpus = "{corpus}"' + GRID.format(seeds=[3, 5, 7]))
    return path


def grid(path):
    return read_grid(path, path.parent / "out")


def change(path, **cells):
    """The same table with these cells in its first row."""
    table = read_rows(path)
    for column, cell in cells.items():
        table.loc[0, column] = cell
    table.to_csv(path, index=False)


def test_a_row_says_what_it_takes_to_make_it_again(made, small_corpus, sentences):
    table = read_rows(made.with_suffix(".csv"))
    assert list(table.columns[:10]) == ["run", *IDENTITY]
    row = table.iloc[0]
    assert row["contestant"] == "Focal-InfoNCE"
    assert row["corpus"] == small_corpus.name
    assert row["corpus_sha256"] == text_hash(sentences[:40])
    assert [row[k] for k in ("seed", "steps", "batch_size", "precision")] == [
        "3",
        "2",
        "4",
        "float32",
    ]
    assert row["device"].endswith(f"{(n := torch.get_num_threads())} thread{'s' * (n > 1)}")
    assert row["versions"] == ", ".join(f"{name} {x}" for name, x in versions().items())
    (first, _) = grid(made).runs
    assert config_of(row) == replace(first, output=None, corpus=small_corpus.name)


def test_a_row_of_the_table_counts_as_done_and_stays(elsewhere):
    before = read_rows(elsewhere.with_suffix(".csv"))
    study = grid(elsewhere)
    (left,) = study.to_run()
    assert left.seed == 7
    run_grid(study)
    after = read_rows(elsewhere.parent / "out/results.csv")
    assert sorted(after["seed"]) == ["3", "5", "7"]
    pd.testing.assert_frame_equal(after[after["seed"] != "7"].reset_index(drop=True), before)
    shutil.copyfile(elsewhere.parent / "out/results.csv", elsewhere.with_suffix(".csv"))
    shutil.rmtree(elsewhere.parent / "out")
    assert grid(elsewhere).to_run() == []


@pytest.mark.parametrize(
    "cells",
    [
        {"corpus_sha256": "0" * 64},
        {"versions": "python 3.11.7, fcse 0.0.1"},
        {"learning_rate": "1e-3"},
        {"Lee": ""},
        {"m": "0.25"},
    ],
)
def test_a_row_of_something_else_does_not_count(cells, elsewhere):
    change(elsewhere.with_suffix(".csv"), **cells)
    assert [run.seed for run in grid(elsewhere).to_run()] == [3, 7]


def test_other_packages_and_machines_count_and_settings_added_later_are_at_their_defaults(
    elsewhere,
):
    path = elsewhere.with_suffix(".csv")
    said = f"python 3.12.1, fcse {versions()['fcse']}, torch 9.9"
    change(path, versions=said, device="cuda:0: a GPU", recipe="minilm-short", run="another-name")
    read_rows(path).drop(columns=["mask_duplicates", "metric"]).to_csv(path, index=False)
    assert [run.seed for run in grid(elsewhere).to_run()] == [7]


def test_rows_of_another_version_are_not_carried_on(elsewhere):
    change(elsewhere.with_suffix(".csv"), versions="python 3.11.7, fcse 0.0.1")
    assert list(current_rows(elsewhere.with_suffix(".csv"))["seed"]) == ["5"]
    assert list(grid(elsewhere).rows()["seed"]) == ["5"]


def test_a_run_that_is_in_two_tables_is_one_row(made):
    own = results(made.parent / "out")
    other = read_rows(made.with_suffix(".csv"))
    other["run"], other["device"] = "made-elsewhere-" + other["seed"], "cpu: another"
    both = joined([own, other])
    assert len(both) == 2
    assert set(both["run"]) == set(own["run"])
    assert list(joined([other, own])["device"]) == ["cpu: another"] * 2


def test_a_model_folder_of_this_machine_has_no_row_on_another(elsewhere, tiny_model):
    text = elsewhere.read_text()
    elsewhere.write_text(f'encoder = "{tiny_model("bert")}"\n{text}')
    path = elsewhere.with_suffix(".csv")
    change(path, encoder=str(tiny_model("bert")))
    assert len(grid(elsewhere).to_run()) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a,b\n1,2\n", "it has no column run"),
        ("run,name\nx,InfoNCE\n", "it has no column contestant"),
        ("", "No columns"),
    ],
)
def test_what_is_no_table_is_one_line(content, said, elsewhere):
    elsewhere.with_suffix(".csv").write_text(content)
    with one_line_refusal(f"study.csv is no table of a study: {said}"):
        grid(elsewhere).to_run()


def test_a_row_comes_out_the_same(made, small_corpus, capsys):
    table = made.with_suffix(".csv")
    run = read_rows(table)["run"][0]
    found = repeat(table, run, small_corpus)
    assert found.verdict == "the same, to the last digit"
    assert found.then == found.now
    assert (found.scores["task"].tolist(), found.scores["difference"].tolist()) == (["Lee"], [0.0])
    both = pd.to_numeric(read_rows(table)["Lee"])
    assert found.scores["sd"][0] == pytest.approx(both.std())
    assert cli_code("repeat", table, run, "--corpus", small_corpus) == 0
    assert capsys.readouterr().out.rstrip().endswith("the same, to the last digit")


@pytest.mark.parametrize(
    ("share", "said", "code"), [(0.01, "the same up to rounding", 0), (3, "not the same", 1)]
)
def test_a_row_that_comes_out_otherwise_says_by_how_much(
    share, said, code, elsewhere, small_corpus, capsys
):
    """The row is altered, not the run."""
    table = elsewhere.with_suffix(".csv")
    run, scores = read_rows(table)["run"][0], pd.to_numeric(read_rows(table)["Lee"])
    moved = share * scores.std()
    change(table, Lee=str(scores[0] + moved))
    of_sd = moved / pd.to_numeric(read_rows(table)["Lee"]).std()
    assert cli_code("repeat", table, run, "--corpus", small_corpus) == code
    verdict = capsys.readouterr().out.splitlines()[-1]
    form = f"{moved:.3f}, {of_sd:.2f} of the seeds' standard deviation"
    assert verdict == f"{said}: the scores differ by at most {form}"


def cli_code(*arguments):
    try:
        cli.main([*map(str, arguments)])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def test_what_cannot_be_repeated_is_one_line(made, elsewhere, tmp_path, monkeypatch):
    table = elsewhere.with_suffix(".csv")
    run = read_rows(table)["run"][0]
    monkeypatch.chdir(tmp_path)
    with one_line_refusal("study.csv has no run 'x': its column run names them"):
        repeat(table, "x")
    with one_line_refusal("was trained on the file forty.txt: name it with --corpus"):
        repeat(table, run)
    other = tmp_path / "other.txt"
    other.write_text("Another sentence.\n" * 9)
    with one_line_refusal(f"corpus {other} holds other sentences .* name that one with --corpus"):
        repeat(table, run, other)
    change(table, learning_rate="fast")
    with one_line_refusal("learning_rate must be a number, got 'fast'"):
        repeat(table, run, tmp_path / "data/forty.txt")


def test_a_row_is_repeated_with_its_threads(made, small_corpus, elsewhere, monkeypatch):
    table = elsewhere.with_suffix(".csv")
    change(table, device="cpu: a processor, AMX, 3 threads")
    seen = []
    before = torch.get_num_threads()
    made_by = workers.run_one

    def looked_at(*call, **kept):
        seen.append(torch.get_num_threads())
        return made_by(*call, **kept)

    monkeypatch.setattr("fcse.study.repeat.run_one", looked_at)
    found = repeat(table, read_rows(table)["run"][0], small_corpus)
    assert seen == [3]
    assert torch.get_num_threads() == before
    assert "3 threads" in found.now
