"""The training panel: real runs of a tiny model in their own process, watched from outside."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
import torch

from fcse.cli import _parse
from fcse.config import TrainConfig
from fcse.recipes import recipe
from fcse.training import load_run, train
from fcse.widgets.training import Progress, TrainingPanel, _command, comparison

LONG = 5000


@pytest.fixture
def config(tiny_model, small_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("FCSE_RUNS", str(tmp_path / "runs"))
    return replace(
        recipe("minilm-short"),
        encoder=str(tiny_model("bert")),
        corpus=str(small_corpus),
        batch_size=8,
        steps=3,
        eval_steps=2,
        checkpoints=False,
    )


@pytest.fixture
def panel(config):
    panel = TrainingPanel(lambda: config)
    yield panel
    panel.close()


def until(condition, seconds=60):
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
    assert (row["loss"], row["settings"]) == ("Focal-InfoNCE", "τ 0.05, m 0.3")
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
    panel.wait(20)
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
    panel._base = lambda: replace(config, temperature=-1.0)
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
    kernel = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import pathlib, subprocess, sys, time\n"
            "child = subprocess.Popen(sys.argv[2:], stdin=subprocess.PIPE)\n"
            "pathlib.Path(sys.argv[1]).write_text(str(child.pid))\n"
            "time.sleep(600)",
            pid_file,
            *_command(replace(config, steps=LONG), tmp_path / "run"),
        ],
        stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    until(metrics.exists)
    child = psutil.Process(int(pid_file.read_text()))
    kernel.kill()
    kernel.wait()
    assert psutil.wait_procs([child], timeout=20)[1] == []
    assert len(metrics.read_text().splitlines()) < LONG


@pytest.mark.parametrize("changes", [{}, {"objective": "hardness_info_nce", "alpha": 2.0}])
def test_the_command_names_every_setting(config, changes, tmp_path):
    config = replace(config, m=-0.25, stop_gradient=True, seed=2**32 - 1, precision="bf16")
    config = replace(config, checkpoints=True, metric="lee", **changes)
    _, _, module, *arguments = _command(config, tmp_path)
    assert module == "fcse.attended"
    assert _parse(arguments).keywords["config"] == replace(config, output=str(tmp_path))


def test_settings_name_what_acts_on_the_loss():
    runs = [
        TrainConfig(objective="info_nce", m=0.9),
        TrainConfig(modulate="positive", stop_gradient=True),
        TrainConfig(objective="hardness_info_nce", alpha=4.0),
    ]
    scored = [{"step": 0, "lee": 50.0}]
    table = comparison([Progress(run, Path("run"), [], scored) for run in runs])
    assert list(table["settings"]) == ["τ 0.05", "τ 0.05, modulates positive", "τ 0.05, α 4"]
