"""A run that is killed, stopped or cannot write goes on as if nothing had been."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace

import pytest
from conftest import one_line_refusal, train_until_interrupted
from own_process import flags, start

from fcse.training import load_run, read_run, train


@pytest.fixture(scope="module")
def undisturbed(tiny_config, tmp_path_factory):
    config = tiny_config(
        tmp_path_factory.mktemp("undisturbed") / "run",
        recipe="minilm-wiki",
        steps=40,
        learning_rate=1e-2,
        eval_steps=5,
        metric="lee",
        checkpoints=True,
    )
    return train(config)


@pytest.fixture
def config(undisturbed, tmp_path):
    return replace(undisturbed.config, output=str(tmp_path / "run"))


def same(run, undisturbed):
    assert run.record["weights"] == undisturbed.record["weights"]
    assert run.record["scores"] == undisturbed.record["scores"]
    assert run.record["kept_step"] == undisturbed.record["kept_step"]
    assert run.losses == undisturbed.losses
    assert run.evaluations == undisturbed.evaluations
    assert run.checkpoints.keys() == undisturbed.checkpoints.keys()
    for name in ("model/model.safetensors", "model/head.safetensors", "checkpoints/5.safetensors"):
        assert (run.folder / name).read_bytes() == (undisturbed.folder / name).read_bytes()
    assert {p.name for p in run.folder.iterdir()} == {p.name for p in undisturbed.folder.iterdir()}


def kill(process, wait):
    process.join(wait)
    process.kill()
    process.join()


def kill_in_a_write(process, wait, states):
    """Kill -9 while a state is being written, at least one whole state after `wait` seconds."""

    def written():
        return {path.name for path in states.glob("*") if path.name.isdecimal()}

    process.join(wait)
    before = written()
    while process.is_alive() and not written() - before:
        time.sleep(0.0005)
    while process.is_alive() and not any(states.glob("*.partial")):
        time.sleep(0.0005)
    kill(process, 0)


@pytest.mark.parametrize(
    ("kills", "steps"), [(4, 100), pytest.param(20, 1500, marks=pytest.mark.long)]
)
def test_killed_at_any_moment_it_ends_as_undisturbed(config, tmp_path, kills, steps):
    config = replace(config, steps=steps)
    alone = replace(config, output=str(tmp_path / "undisturbed"))
    start(["--help"], tmp_path / "errors.txt").join()  # what is imported once for all is not timed
    started = time.perf_counter()
    start(flags(alone), tmp_path / "errors.txt").join()
    took = time.perf_counter() - started
    undisturbed = load_run(alone)
    moments = random.Random(kills)
    states = tmp_path / "run/resume"
    codes, whole = [], set()
    for i in range(kills):
        process = start(flags(config), tmp_path / "errors.txt")
        wait = moments.uniform(0, min(0.4 * took, 10))
        kill_in_a_write(process, wait, states) if i % 2 else kill(process, wait)
        codes.append(process.exitcode)
        found = {path.name for path in states.glob("*") if path.name.isdecimal()}
        assert len(found) <= 3
        whole |= found
    assert codes.count(-signal.SIGKILL) > kills / 2, "it finished before it was killed"
    assert whole, "no state was ever written"
    same(train(config), undisturbed)
    assert not states.exists()


@pytest.mark.parametrize("killed", [False, True])
def test_two_who_ask_for_one_run_share_it(config, undisturbed, tmp_path, killed):
    """The second waits for the first, and takes over where that ends early."""
    start(["--help"], tmp_path / "errors.txt").join()
    first = start(flags(config), tmp_path / "first.txt")
    metrics, waits = tmp_path / "run/metrics.jsonl", tmp_path / "second.txt"
    while first.is_alive() and not metrics.exists():
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)  # so that it is still at work when the second comes
    waits.touch()
    second = start(flags(config), waits)
    while second.is_alive() and "trained by another process" not in waits.read_text():
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL if killed else signal.SIGCONT)
    first.join()
    second.join()
    assert first.exitcode == (-signal.SIGKILL if killed else 0)
    assert second.exitcode == 0
    assert f"{config.output} is being trained by another process" in waits.read_text()
    same(load_run(config), undisturbed)


def test_it_goes_on_from_the_last_whole_state(config, undisturbed, tmp_path):
    train_until_interrupted(config, 14)
    states = tmp_path / "run/resume"
    assert {path.name for path in states.iterdir()} == {"5", "10"}
    whole = (states / "10/state.safetensors").read_bytes()
    (states / "10/state.safetensors").write_bytes(whole[: len(whole) // 2])
    seen = []
    same(train(config, lambda step, encoder: seen.append(step)), undisturbed)
    assert seen == list(range(6, 41))


def test_without_a_whole_state_it_starts_again(config, undisturbed, tmp_path):
    def stop(step, encoder):
        if step == 7:
            shutil.rmtree(tmp_path / "run/resume/5")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, stop)
    same(train(config), undisturbed)


@pytest.mark.parametrize(
    ("signal_", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_signals_end_it_as_shells_expect(config, undisturbed, tmp_path, signal_, code, word):
    errors = tmp_path / "errors.txt"
    process = start(flags(config), errors)
    while not (tmp_path / "run/resume/5").exists():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal_)
    process.join()
    assert process.exitcode == code
    said = errors.read_text().splitlines()[-1]
    assert said == f"fcse: {word}: training goes on when the same command is given"
    same(train(config), undisturbed)


@pytest.mark.parametrize("size", [2_000, 20_000, 200_000])
def test_a_disk_that_takes_no_more_is_one_line(config, undisturbed, tmp_path, size):
    errors = tmp_path / "errors.txt"
    process = start(flags(config), errors, size)
    process.join()
    assert process.exitcode == 2
    said = errors.read_text().strip().splitlines()[-1]
    assert said.startswith(f"fcse: run {tmp_path / 'run'} cannot be written (")
    assert "Traceback" not in said
    same(train(config), undisturbed)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_read_only_folder_is_one_line(config, tmp_path):
    tmp_path.chmod(0o500)
    with one_line_refusal("cannot be written"):
        train(config)
    tmp_path.chmod(0o700)


def test_a_half_written_last_line_is_taken_back(config, undisturbed, tmp_path):
    def stop(step, encoder):
        if step == 8:
            with (tmp_path / "run/metrics.jsonl").open("a") as file:
                file.write('{"step": 9, "lo')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, stop)
    same(train(config), undisturbed)


def test_other_settings_do_not_go_on_with_it(config):
    train_until_interrupted(config, 5)
    with one_line_refusal("holds another run"):
        train(replace(config, seed=1))
    assert json.loads((config.folder / "run.json").read_text())["finished"] is False
    with one_line_refusal("holds no finished run"):
        read_run(config.folder)
