"""The training panel: real runs of a tiny model in their own process, watched from outside."""

import json
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
import torch

from fcse.config import TrainConfig, configured
from fcse.training import load_run, train
from fcse.widgets.training import Progress, TrainingPanel, comparison

LONG = 5000


@pytest.fixture
def config(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("FCSE_RUNS", str(tmp_path / "runs"))
    return replace(tiny_config("-", steps=3, eval_steps=2), output=None)


@pytest.fixture
def panel(config):
    panel = TrainingPanel(lambda: config)
    yield panel
    panel.close()


def until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_trains_in_its_own_process_and_joins_the_table(panel, config):
    state, picture = torch.get_rng_state(), panel.png
    panel.train_button.click()
    assert panel.train_button.disabled
    assert not panel.stop_button.disabled
    panel.wait()
    assert torch.equal(torch.get_rng_state(), state)
    assert panel.stop_button.disabled
    assert not panel.train_button.disabled
    assert "Trained" in panel.message

    run = load_run(config)
    (shown,) = panel.finished
    assert shown.losses == run.losses
    assert shown.evaluations == run.evaluations
    assert len(run.losses) == 3
    assert panel.png != picture
    (row,) = comparison(panel.finished).to_dict("records")
    assert row["loss"] == "Focal-InfoNCE"
    assert (row["seed"], row["steps"]) == (0, 3)
    assert row["Lee before"] == run.evaluations[0]["lee"]
    assert row["Lee after"] == run.evaluations[-1]["lee"]
    assert "forty.txt" in panel._table.value
    assert "no evidence" in panel._table.value
    assert f"loss {run.losses[-1]:.4f}" in panel._picture.value


def test_a_run_that_is_there_is_loaded_once(panel, config):
    other = replace(config, objective="info_nce", seed=1)
    for each in (config, other):
        train(each)
    for seed in (0, 0):
        panel.seed.value = seed
        panel.start()
        assert not panel.running
        assert "there already" in panel.message
    assert len(panel.finished) == 1
    assert panel.finished[0].losses == load_run(config).losses
    panel._base = lambda: other
    panel.seed.value = 1
    panel.start()
    assert list(comparison(panel.finished)["loss"]) == ["Focal-InfoNCE", "InfoNCE"]


def test_the_live_curve_is_what_the_run_writes_and_stop_ends_it(panel, tmp_path):
    panel.steps.value = LONG
    panel.start()
    until(lambda: len(panel.live.losses) > 3 and panel.live.evaluations)
    thread, shown = panel._thread, panel.live
    panel.start()
    assert panel._thread is thread
    assert f"of {LONG}" in panel.message
    panel.stop_button.click()
    panel.wait(120)
    assert not panel.running
    assert panel.message == f"Stopped after {len(panel.live.losses)} steps."
    assert not panel.finished

    (path,) = tmp_path.glob("runs/*/metrics.jsonl")
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    written = [row["loss"] for row in lines if "loss" in row]
    assert shown.losses == written[: len(shown.losses)]
    assert panel.live.losses == written
    assert shown.evaluations[0] == next(row for row in lines if "lee" in row)

    panel.start()
    seen = [0]
    until(lambda: seen.append(len(panel.live.losses)) or seen[-1] > len(written))
    assert seen == sorted(seen), "the broken-off try shows as this one"
    assert panel.live.losses[:3] == written[:3]


def test_what_the_process_complains_of_is_shown(panel):
    panel.encoder.value = "no-such-encoder"
    panel.start()
    panel.wait()
    assert "encoder 'no-such-encoder' could not be loaded" in panel.message
    assert 'role="alert"' in panel._message.value
    assert not panel.train_button.disabled


def test_a_config_out_of_range_is_said_at_once(config):
    panel = TrainingPanel(lambda: config)
    panel._base = lambda: configured(config, {"temperature": -1.0})
    panel.start()
    assert not panel.running
    assert "temperature must be" in panel.message
    panel.close()


def upload(panel, name, content):
    file = {"name": name, "type": "text/plain", "size": len(content), "content": content}
    panel.upload.value = (file | {"last_modified": datetime.now(UTC)},)


def test_an_uploaded_file_is_the_corpus(panel, sentences, tmp_path):
    kept = tmp_path / "runs" / "corpora"
    content = "\n".join(sentences[40:60]).encode()
    upload(panel, "../mine.txt", content)
    (path,) = kept.iterdir()
    assert path.read_bytes() == content
    assert path.name.startswith("mine-")
    assert panel.corpus.value == panel.config.corpus == str(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"a line\nbad \xff\xfe\n", "is not UTF-8 (line 2)"), (b" \n", "has no sentences")],
)
def test_a_file_that_is_no_corpus_is_refused_when_it_is_dropped(panel, content, said, tmp_path):
    before = panel.corpus.value
    upload(panel, "mine.txt", content)
    assert panel.message.startswith("mine.txt cannot be the corpus: ")
    assert said in panel.message
    assert panel.corpus.value == before
    assert not list((tmp_path / "runs" / "corpora").iterdir())


def test_stopping_and_closing_are_harmless_at_any_time(config):
    panel = TrainingPanel(lambda: config)
    panel.stop()
    panel.wait()
    panel.steps.value = LONG
    panel.start()
    panel.close()
    assert not panel.running
    panel.stop()
    panel.close()


def test_the_process_ends_with_whoever_started_it(config, tmp_path):
    """A kernel that is killed runs none of its own clean-up."""
    pid_file = tmp_path / "pid"
    given = tmp_path / "config"
    given.write_bytes(pickle.dumps(replace(config, steps=LONG, output=str(tmp_path / "run"))))
    kernel = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, pathlib, pickle, sys, time\n"
            "from fcse.training import apart, train\n"
            "pid, config = map(pathlib.Path, sys.argv[1:])\n"
            "config = pickle.loads(config.read_bytes())\n"
            "child = apart.start(train, config, output=pathlib.Path(os.devnull))\n"
            "pid.write_text(str(child.pid))\n"
            "time.sleep(600)",
            *(pid_file, given),
        ],
        stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(lambda: kernel.poll() is not None or metrics.exists())
    child = psutil.Process(int(pid_file.read_text()))
    kernel.kill()
    kernel.wait()
    assert psutil.wait_procs([child], timeout=60)[1] == []
    assert len(metrics.read_text().splitlines()) < LONG


@pytest.mark.parametrize(
    "changes",
    [
        {"m": -0.25, "stop_gradient": True, "sscl.layers": 2, "micro_batch_size": 4},
        {"objective": "hardness_info_nce+diffcse", "alpha": 2.0, "metric": "lee"},
    ],
)
def test_the_process_is_given_every_setting(config, changes):
    given = {"precision": "bf16", "checkpoints": True, "mask_duplicates": False}
    base = configured(config, changes | given)
    panel = TrainingPanel(lambda: base)
    panel.seed.value, panel.steps.value = 2**32 - 1, 1
    panel.start()
    panel.wait()
    assert "Trained" in panel.message
    (run,) = panel.finished
    assert run.config == replace(base, seed=2**32 - 1, steps=1)
    record = json.loads((run.folder / "run.json").read_text())
    assert record["config"] == run.config.settings
    assert load_run(run.config).losses == run.losses
    panel.close()


def test_an_objective_from_a_notebook_s_cell_trains_in_the_process(config):
    cell = {"__name__": "__main__"}  # where a kernel runs its cells: no process can import it
    code = """
        from dataclasses import dataclass

        @dataclass(frozen=True)
        class Squared:
            temperature: float = 0.1
            held: object = None

            def logits(self, sim, positives):
                return sim * sim.abs() / self.temperature
    """
    exec(textwrap.dedent(code), cell)
    mine = replace(config, objective=cell["Squared"](0.2))
    panel = TrainingPanel(lambda: mine)
    panel.start()
    panel.wait()
    assert "Trained" in panel.message
    assert list(comparison(panel.finished)["loss"]) == ["Squared (temperature=0.2)"]
    assert panel.finished[0].losses == load_run(mine).losses
    here = train(replace(mine, output=f"{mine.folder}-here"))
    assert here.losses == panel.finished[0].losses

    panel._base = lambda: replace(config, objective=cell["Squared"](0.2, threading.Lock()))
    panel.start()
    panel.wait()
    assert "could not be started: no other process can train this" in panel.message
    assert not panel.train_button.disabled
    panel.close()


def test_the_table_tells_losses_apart():
    runs = [
        configured(TrainConfig(), settings)
        for settings in (
            {"objective": "info_nce", "m": 0.9},
            {"modulate": "positive", "stop_gradient": True},
            {"objective": "hardness_info_nce", "alpha": 4},
            {"objective": "adap_acse", "adap_acse.margin": 0.1},
            {"objective": "adap_acse", "adap_acse.margin": 0.2},
        )
    ]
    scored = [{"step": 0, "lee": 50.0}]
    table = comparison([Progress(run, Path("run"), [], scored) for run in runs])
    assert list(table["loss"]) == [
        "InfoNCE",
        "Focal-InfoNCE (modulate=positive, stop_gradient=True)",
        "Hardness-InfoNCE (alpha=4.0)",
        "InfoNCE + AdapACSE (margin=0.1)",
        "InfoNCE + AdapACSE (margin=0.2)",
    ]
