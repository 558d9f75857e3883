"""Methods from outside the package: a queue of past vectors, a module of its own, a schedule."""

import json
from collections import deque
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import train_until_interrupted
from own_process import train_until_killed
from safetensors.torch import load_file
from torch import nn

from fcse.methods import Method, Moments
from fcse.training import read_run, train


@dataclass(frozen=True)
class Queue(Method):
    """Vectors of the last batches join as negatives of every row."""

    batches: int = 2
    switches = ("batches",)

    def begin(self, start):
        return _Queue(self.batches)


class _Queue(Moments):
    def __init__(self, batches):
        self.past, self.now = deque(maxlen=batches), None

    def loss(self, value, compared):
        return value(compared.more(torch.cat([*self.past])) if self.past else compared)

    def beside(self, compared):
        self.now = compared.v.detach()

    def after_step(self, step):
        self.past.append(self.now)

    def state(self):
        return {f"past/{i}": x for i, x in enumerate(self.past)}

    def restore(self, state):
        self.past.extend(state[name] for name in sorted(state))


@dataclass(frozen=True)
class Predicted(Method):
    """A layer of its own guesses the second view, with dropout, running statistics and a weight."""

    weight: float = 0.1
    switches = ("weight",)

    def begin(self, start):
        return _Predicted(self.weight, start.encoder.dimension)


class _Predicted(Moments):
    def __init__(self, weight, width):
        self.weight = weight
        self.module = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.1))

    def beside(self, compared):
        own = compared.v[: len(compared.u)].detach()
        return self.weight * (self.module(compared.u) - own).square().mean()


@dataclass(frozen=True)
class Cooling(Method):
    """The temperature falls from `factor` times its value to its value."""

    factor: float = 2.0

    def begin(self, start):
        return _Cooling(self.factor, start.config.steps)


class _Cooling(Moments):
    def __init__(self, factor, steps):
        self.factor, self.steps = factor, steps

    def objective(self, step, objective):
        left = 1 - step / self.steps
        return replace(objective, temperature=objective.temperature * (1 + self.factor * left))


@dataclass(frozen=True)
class Drift(Method):
    """Both views are drawn to those of the step before."""

    weight: float = 0.1

    def begin(self, start):
        return _Drift(self.weight)


class _Drift(Moments):
    def __init__(self, weight):
        self.weight, self.before, self.now = weight, None, None

    def beside(self, compared):
        self.now = torch.stack([compared.u, compared.v[: len(compared.u)]])
        before = self.now.detach() if self.before is None else self.before
        return self.weight * (self.now - before).square().sum()

    def after_step(self, step):
        self.before = self.now.detach()

    def state(self):
        return {"views": self.before, "anchors": self.before[0]}  # one is a part of the other

    def restore(self, state):
        self.before = state["views"]
        assert torch.equal(state["anchors"], self.before[0])


OWN = [Queue(), Predicted(), Cooling(), Drift()]


@pytest.fixture
def config(tiny_config, tmp_path):
    return tiny_config(tmp_path / "run", objective="info_nce", eval_steps=2)


@pytest.mark.parametrize("method", OWN, ids=lambda method: method.key)
def test_it_trains_and_goes_on_after_a_kill(config, tmp_path, method):
    config = replace(config, methods=(method,))
    plain = train(replace(config, methods=(), output=str(tmp_path / "plain")))
    whole = train(replace(config, output=str(tmp_path / "whole")))
    assert whole.losses != plain.losses

    train_until_interrupted(config, 5)
    again = train(config)
    assert again.losses == whole.losses
    assert again.record["weights"] == whole.record["weights"]


def test_killed_the_queue_is_in_the_resume_file_and_goes_on(config, tmp_path):
    config = replace(config, methods=(Queue(), Predicted()))
    whole = train(replace(config, output=str(tmp_path / "whole")))
    train_until_killed(config, 5)
    state = load_file(config.folder / "resume/4/state.safetensors")
    held = [state[f"method/queue/past/{i}"] for i in range(2)]
    assert all(x.shape == (config.batch_size, 32) for x in held)
    assert not torch.equal(*held)
    steps = []
    again = train(config, lambda step, encoder: steps.append(step))
    assert steps == [5, 6]
    assert again.losses == whole.losses
    assert again.record["weights"] == whole.record["weights"]
    assert not (config.folder / "resume").exists()
    assert {p.name for p in (config.folder / "model").iterdir()} == {
        p.name for p in (whole.folder / "model").iterdir()
    }


def test_more_negatives_cost_more(config, tmp_path):
    """The first step has no past; with the queue the later rows have more to be told from."""
    queue = train(replace(config, methods=(Queue(),)))
    plain = train(replace(config, output=str(tmp_path / "plain")))
    assert queue.losses[0] == plain.losses[0]
    assert queue.losses[1] > plain.losses[1]


@pytest.mark.parametrize("off", [Queue(0), Predicted(0.0)], ids=lambda method: method.key)
def test_switched_off_it_is_plain_training(config, tmp_path, off):
    without = replace(config, methods=(off,))
    assert without == config
    assert without.run_name == config.run_name
    assert train(without).losses == train(replace(config, output=str(tmp_path / "plain"))).losses


def test_its_settings_are_in_the_record_and_its_name(config):
    run = train(replace(config, methods=(Queue(3),)))
    settings = json.loads((run.folder / "run.json").read_text())["config"]
    assert settings["objective"] == "info_nce+queue"
    assert settings["queue.batches"] == 3
    assert run.config.name == read_run(run.folder).config.name == "InfoNCE + Queue (batches=3)"


def test_it_goes_with_the_kits_methods(config):
    run = train(replace(config, objective="focal_info_nce+sscl", methods=(Queue(), Predicted())))
    assert run.config.name == "Focal-InfoNCE + Predicted + Queue + SSCL"
    assert len(run.losses) == 6
