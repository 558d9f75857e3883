"""A study from a TOML file: what it holds, what it repeats, what survives a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from conftest import one_line_refusal

from fcse import cli, losses
from fcse.config import TrainConfig, configured, recorded
from fcse.errors import InputError
from fcse.objectives import OBJECTIVES
from fcse.study import workers
from fcse.study.grid import plan, read_grid
from fcse.study.report import load_runs
from fcse.study.slurm import Slurm
from fcse.study.tables import IDENTITY, results
from fcse.study.workers import run_one

TWO = """
[[runs]]
objective = "info_nce"
[[runs]]
objective = "focal_info_nce"
"""


@pytest.fixture
def grid(tmp_path):
    """TOML text -> the grid it describes."""

    def read(text):
        path = tmp_path / "study.toml"
        path.write_text(text, encoding="utf-8")
        return read_grid(path, tmp_path / "out")

    return read


def command(*arguments):
    """Exit code of the command line, run in this process."""
    try:
        cli.main(["study", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code or 0
    return 0


def tree(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def settings(runs, *names):
    return [tuple(run.settings[name] for name in names) for run in runs]


def test_lists_are_crossed_and_seeds_come_last(grid):
    runs = grid("""
        steps = [4, 8]
        seeds = [3, 5]
        [[runs]]
        temperature = [0.03, 1]
        """).runs
    expected = [(seed, s, t) for seed in (3, 5) for s in (4, 8) for t in (0.03, 1.0)]
    assert settings(runs, "seed", "steps", "temperature") == expected
    assert all(isinstance(run.objective.temperature, float) for run in runs)
    assert len({run.output for run in runs}) == len(runs)


def test_the_grid_of_the_readme(grid):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    runs = grid(readme.partition("```toml\n")[2].partition("```")[0]).runs
    assert len(runs) == 8 * (3 + 2 + 1 + 2)  # m does nothing where positives alone are modulated


def test_a_table_wins_over_the_top_and_the_top_over_the_recipe(grid):
    (run,) = grid("""
        recipe = "minilm-short"
        steps = 4
        batch_size = 8
        [[runs]]
        steps = 6
        """).runs
    assert (run.recipe, run.learning_rate, run.batch_size, run.steps) == (
        *("minilm-short", 5e-5),
        *(8, 6),
    )


def test_runs_that_come_to_the_same_are_one(grid):
    runs = grid("""
        seeds = 2
        m = [0.1, 0.3]
        [[runs]]
        objective = "info_nce"
        stop_gradient = [true, false]
        alpha = [1, 2]
        [[runs]]
        modulate = ["none", "positive"]
        [[runs]]
        objective = "hardness_info_nce"
        modulate = ["both", "negative"]
        [[runs]]
        modulate = ["both", "negative"]
        [[runs]]
        m = 0.1
        """).runs
    assert [run.name for run in runs if run.seed == 1] == [
        *("InfoNCE", "Focal-InfoNCE (modulate=positive)", "Hardness-InfoNCE"),
        *("Focal-InfoNCE (m=0.1)", "Focal-InfoNCE (m=0.1, modulate=negative)"),
        *("Focal-InfoNCE", "Focal-InfoNCE (modulate=negative)"),
    ]
    assert len(runs) == 14


@pytest.mark.parametrize("objective", ["info_nce", "focal_info_nce", "hardness_info_nce"])
@pytest.mark.parametrize("modulate", ["both", "positive", "negative", "none"])
def test_one_way_of_writing_keeps_what_acts(objective, modulate):
    given = {"temperature": 0.1, "modulate": modulate, "m": 0.7, "stop_gradient": True, "alpha": 2}
    config = configured(TrainConfig(), {"objective": objective} | given)
    assert replace(config) == configured(config, config.settings) == config
    m_acts = objective == "focal_info_nce" and modulate in ("both", "negative")
    assert (config.settings.get("m") == 0.7) == m_acts
    assert (config.settings.get("alpha") == 2.0) == (objective == "hardness_info_nce")

    kind = OBJECTIVES[objective]
    said = kind(**{name: x for name, x in given.items() if hasattr(kind, name)})
    sim = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    for what in (losses.logits, losses.gradient_weights):
        assert torch.equal(what(sim, said), what(sim, config.objective))


@pytest.mark.parametrize(("there", "taken"), [(True, "bf16"), (False, "float32")])
def test_auto_is_resolved_when_a_grid_is_planned(there, taken, grid, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: there)
    planned = grid(
        'precision = "auto"\nscore_precision = ["auto", "float32"]\n[[runs]]\nsteps = 2'
    ).runs
    assert {run.precision for run in planned} == {taken}
    assert [run.score_precision for run in planned] == [taken, "float32"][: 1 + there]


def test_a_machine_without_units_refuses_a_run_that_was_planned_with_them(grid, tiny, monkeypatch):
    (run,) = grid(f'{tiny}\n[[runs]]\nprecision = "bf16"').runs
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(InputError, match=r"^this study is planned in bf16, .* no units for it"):
        workers.run_one(run, ("Lee",), False)
    assert not run.folder.exists()


def test_plan_shows_what_varies(grid):
    table = plan(grid(f"seeds = [4, 7]\nm = [0.1, 0.3]\nsteps = 5\n{TWO}steps = [5, 9]").runs)
    assert table.to_dict("records") == [
        {"contestant": name, "steps": steps, "seeds": "4 7"}
        for name, steps in (
            ("InfoNCE", "5"),
            *(("Focal-InfoNCE (m=0.1)", "5"), ("Focal-InfoNCE (m=0.1)", "9")),
            *(("Focal-InfoNCE", "5"), ("Focal-InfoNCE", "9")),
        )
    ]


def test_methods_are_reached_by_their_names(grid):
    runs = grid("""
        seeds = [4]
        sscl.layers = [1, 2]
        [[runs]]
        [[runs]]
        objective = "info_nce+diffcse"
        sscl = { layers = 0 }
        """).runs
    assert plan(runs).to_dict("records") == [
        {"contestant": name, "seeds": "4"}
        for name in (
            *("Focal-InfoNCE + SSCL (layers=1)", "Focal-InfoNCE + SSCL"),
            "InfoNCE + DiffCSE",
        )
    ]


WRONG = {
    "temprature = 1": "unknown key 'temprature': did you mean temperature?",
    "[[runs]]\nzzz = 1": r"unknown key 'zzz' in \[\[runs\]\] table 1: choose from objective,",
    "seed = 1\n[[runs]]": "unknown key 'seed': did you mean seeds?",
    "[[runs]]\nseeds = 2": r"seeds in \[\[runs\]\] table 1: it belongs at the top",
    "output = 'x'\n[[runs]]": "unknown key 'output'",
    "[[runs]]\nsteps = 1.5": "steps must be a whole number, got 1.5",
    "[[runs]]\nsteps = true": "steps must be a whole number, got True",
    "[[runs]]\nm = ['a']": "m must be a number, got 'a'",
    "[[runs]]\nm = [[1.0]]": r"m must be a number, got \[1.0\]",
    "[[runs]]\nstop_gradient = 1": "stop_gradient must be true or false, got 1",
    "[[runs]]\nobjective = 1": "objective must be a string, got 1",
    "[[runs]]\nobjective = 'x'": "unknown objective 'x': choose from",
    "[[runs]]\ntemperature = 0": "temperature must be a finite number above 0",
    "layers = 2\n[[runs]]": "unknown key 'layers'",
    "[[runs]]\nmargin = 0.1": r"unknown key 'margin' in \[\[runs\]\] table 1",
    "[[runs]]\nsscl.layer = 2": "unknown key 'sscl.layer': did you mean layers",
    "[[runs]]\nsscl.layers = 'two'": "sscl.layers must be a whole number, got 'two'",
    "[[runs]]\nsscl = 2": "unknown key 'sscl': write sscl.layers",
    "[[runs]]\nmethods = ['sscl']": "unknown key 'methods'",
    "[[runs]]\nobjective = 'sscl+zzz'": "unknown objective 'zzz': choose from",
    "recipe = 1\n[[runs]]": "recipe must be a string",
    "recipe = 'x'\n[[runs]]": "unknown recipe 'x'",
    "tasks = ['STS99']\n[[runs]]": "unknown task 'STS99'",
    "tasks = 'STS99'\n[[runs]]": "unknown task 'STS99'",
    "tasks = []\n[[runs]]": r"unknown task \[\]",
    "tasks = [[1]]\n[[runs]]": r"unknown task \[1\]",
    "seeds = 'x'\n[[runs]]": "seeds must be a list of whole numbers or a count",
    "seeds = [true]\n[[runs]]": "seeds must be a list",
    "seeds = [-1]\n[[runs]]": "seed must be at least 0",
    "seeds = 0\n[[runs]]": "empty grid",
    "seeds = []\n[[runs]]": "empty grid",
    "": "empty grid: add a",
    "runs = []": "empty grid: add a",
    "runs = 1": r"write \[\[runs\]\] above each",
    "[runs]\nm = 1": r"write \[\[runs\]\] above each",
    "[[runs]]\nm = []": "empty grid: m is an empty list",
    "steps = 4\nm = = 2": "no valid TOML: .*line 2",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_one_line(text, grid):
    with one_line_refusal(WRONG[text]):
        grid(text)


def test_bytes_that_are_no_text_and_files_that_are_not_there(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"recipe = 'caf\xe9'")
    for name in ("latin.toml", "none.toml", "."):
        with one_line_refusal(f"study {tmp_path / name} "):
            read_grid(tmp_path / name, tmp_path / "out")


@pytest.fixture
def tiny(tiny_model, small_corpus):
    """The top of a study that trains a tiny model."""
    return f"""
encoder = "{tiny_model("bert")}"
corpus = "{small_corpus}"
batch_size = 8
steps = 4
max_length = 16
eval_steps = 2
precision = "float32"
"""


@pytest.mark.parametrize(
    "flags",
    [
        *(["--output", "x"], ["--workers", "0"], ["--dry-run"], ["--keep-models"]),
        *(["--executor", "slurm"], ["--mem", "16G"], ["--executor", "cloud"]),
        *(["--config", "study.toml", "--seed", "1"], ["--config", "study.toml", "--workers", "0"]),
        ["--config", "study.toml", "--gpus", "1"],
        ["--config", "study.toml", "--executor", "slurm", "--workers", "0"],
        ["--config", "study.toml", "--executor", "slurm", "--time", "4 h"],
    ],
)
def test_flags_that_do_not_go_together(flags, tmp_path, monkeypatch, capsys):
    (tmp_path / "study.toml").write_text(TWO)
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert command(*flags) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1
    assert err.startswith("fcse: ")
    assert out == ""
    assert tree(tmp_path) == before


def test_a_cluster_that_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with one_line_refusal("needs Slurm: there is no sbatch here"):
        Slurm({})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with one_line_refusal("--executor slurm needs a package: pip install submitit"):
        Slurm({})


def test_an_output_that_is_a_file_or_lies_in_one(grid, tmp_path):
    study = grid(TWO)
    (tmp_path / "out").write_text("")
    with one_line_refusal(f"output {tmp_path / 'out'} is a file"):
        study.to_run()
    inside = replace(study, folder=tmp_path / "out/in")
    with one_line_refusal(f"study in {tmp_path / 'out/in'} stopped: Not a directory"):
        workers.run_grid(inside)


@pytest.mark.usefixtures("no_sts_data")
def test_missing_data_is_said_before_the_first_training(tiny, tmp_path, capsys):
    (tmp_path / "study.toml").write_text(f'tasks = ["STS12"]\n{tiny}{TWO}')
    arguments = ("--config", tmp_path / "study.toml", "--output", tmp_path / "out")
    assert command(*arguments) == 2
    assert "fcse: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_task_more_trains_again_only_where_the_weights_are_gone(grid, tiny, tmp_path):
    (config,) = grid(f"{tiny}sscl.layers = 1\n[[runs]]").runs
    folder = Path(config.output)
    run_one(config, ["Lee"], keep_model=True)
    assert (folder / "model").is_dir()
    before = (folder / "run.json").stat().st_mtime_ns
    known = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").unlink()
    run_one(config, ["Lee"], keep_model=False)
    assert json.loads((folder / "scores.json").read_text()) == known
    assert {p.name for p in folder.iterdir()} == {"run.json", "metrics.jsonl", "scores.json"}
    assert (folder / "run.json").stat().st_mtime_ns == before
    (folder / "scores.json").write_text("{}")
    run_one(config, ["Lee"], keep_model=False)
    assert json.loads((folder / "scores.json").read_text()) == known
    assert (folder / "run.json").stat().st_mtime_ns > before
    (row,) = results(tmp_path / "out").to_dict("records")
    shown = [row[name] for name in ("contestant", "objective", "sscl.layers", "m")]
    assert shown == ["Focal-InfoNCE + SSCL (layers=1)", "focal_info_nce+sscl", 1, 0.3]


@pytest.mark.parametrize(("visible", "named"), [(None, "01"), ("4,7", "47")])
def test_one_worker_a_gpu(visible, named, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert workers.Local().workers == 2
    given = [workers._share(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert given == [*named, named[0]]


def test_workers_share_the_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert workers.Local().workers == 1
    assert workers._share(0, 1) == {}
    assert workers._share(2, 3) == {"OMP_NUM_THREADS": "2"}


def test_a_run_that_is_killed_is_one_line_and_the_next_goes_on(grid, tiny, capsys):
    study = grid(f"{tiny}{TWO}")
    first, second = study.runs

    class KillsTheFirst(workers.Local):
        def start(self, config, *others):
            super().start(config, *others)
            if config == first:
                self._running[config][0].kill()

    with one_line_refusal(f"1 of 2 runs failed, .*: {first.folder.name}$"):
        workers.run_grid(study, KillsTheFirst())
    assert f"failed: {first.folder.name}: ended by SIGKILL" in capsys.readouterr().err
    assert results(study.folder)["run"].tolist() == [second.folder.name]
    assert study.to_run() == [first]


def finished(folder):
    """Run -> when it was finished."""
    return {
        path.parent.name: path.stat().st_mtime_ns
        for path in folder.glob("runs/*/run.json")
        if '"finished": true' in path.read_text()
    }


def wait_for(happened, process, log):
    begun = time.monotonic()
    while not happened():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() - begun < 300
        time.sleep(0.02)


def start(log, *arguments):
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "fcse.cli", "study", *map(str, arguments)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ,
        )


def test_killed_and_resumed_nothing_is_repeated(tiny, tmp_path, capsys):
    """The life of a study: a kill, Ctrl-C, a run that fails, a second call, another study."""
    path, folder, log = tmp_path / "study.toml", tmp_path / "out", tmp_path / "log"
    long = tiny.replace("steps = 4", "steps = 100").replace("eval_steps = 2", "eval_steps = 10")
    failing = '[[runs]]\nobjective = "info_nce"\ntemperature = 1e-38\n'
    path.write_text(f"{long}{TWO}{failing}")
    arguments = ("--config", path, "--output", folder)

    assert command(*arguments, "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.startswith("3 runs: 0 done, 3 to run\n")
    assert "from 2 steps of" in out
    assert not folder.exists()

    def second_is_on_its_way():
        return len(finished(folder)) == 1 and any(folder.glob("runs/focal*/resume/[0-9]*"))

    process = start(log, *arguments)
    wait_for(second_is_on_its_way, process, log)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 3  # the run, what it was forked from, and multiprocessing's own
    process.kill()
    process.wait()
    assert psutil.wait_procs(children, timeout=60)[1] == [], "a run outlived its study"
    before = finished(folder)
    assert len(before) == 1
    assert len(pd.read_csv(folder / "results.csv")) == 1

    assert command(*arguments, "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.startswith("3 runs: 1 done, 2 to run\n")
    assert "from 1 finished run of" in out

    process = start(log, *arguments)

    def children_of_the_study():
        return psutil.Process(process.pid).children(recursive=True)

    wait_for(lambda: len(children_of_the_study()) == 3, process, log)
    children = children_of_the_study()
    assert command(*arguments) == 2
    assert f"another study works in {folder}" in capsys.readouterr().err
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert "interrupted" in log.read_text()
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert finished(folder) == before

    assert command(*arguments) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("fcse: 1 of 3 runs failed, and the same command tries")
    (failure,) = [line for line in err.splitlines() if line.startswith("failed: info_nce-seed0-")]
    assert "at step 1 the loss is" in failure
    after = finished(folder)
    assert len(after) == 2
    assert before.items() <= after.items(), "a finished run was repeated"
    (focal,) = folder.glob("runs/focal*/metrics.jsonl")
    steps = [json.loads(line) for line in focal.read_text().splitlines()]
    assert [s["step"] for s in steps if "loss" in s] == list(range(1, 101))
    assert not any(folder.glob("runs/*/model"))

    path.write_text(f'{tiny}seeds = 2\n[[runs]]\nobjective = "info_nce"\n')
    assert command(*arguments, "--keep-models", "--workers", "2") == 0
    assert len(list(folder.glob("runs/*/model"))) == 2
    table = pd.read_csv(folder / "results.csv")
    assert len(table) == 4
    assert table["run"].is_unique
    assert sorted(table["steps"]) == [4, 4, 100, 100]
    assert after.items() <= finished(folder).items()
    done = tree(folder / "runs")
    assert command(*arguments) == 0
    assert tree(folder / "runs") == done

    wanted = {"run", *IDENTITY, "objective", "m", "temperature", "wall_time_s", "kept_step"}
    assert wanted | {"Lee", "Lee_alignment", "Lee_uniformity"} <= {*table}
    assert table["m"].isna().tolist() == (table["objective"] == "info_nce").tolist()
    runs = load_runs(folder / "runs")
    assert {path.name for path in runs["folder"]} == {*table["run"]}
    for row in table.to_dict("records"):
        record = json.loads((folder / "runs" / row["run"] / "run.json").read_text())
        assert row["Lee"] == pytest.approx(record["scores"]["lee"])
        assert row["run"][-8:] == recorded(record["config"]).run_name[-8:]


def test_a_damaged_record_is_named(grid, tmp_path):
    text = "[[runs]]\nsteps = 4\n"
    folder = Path(grid(text).runs[0].output)
    folder.mkdir(parents=True)
    for content in ("{", "[]", '{"finished": true}'):
        (folder / "run.json").write_text(content)
        (folder / "scores.json").write_text("{}")
        with one_line_refusal(f"{folder} holds a damaged record"):
            results(tmp_path / "out")
    with pytest.raises(InputError, match="damaged"):
        (folder / "run.json").write_text("{")
        grid(text).to_run()
