"""A reader's own objective, ten lines of it: everything that the kit's objectives have."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import one_line_refusal
from own_process import train_until_killed

from fcse import analysis, cli, losses
from fcse.config import configured
from fcse.methods.core_tuning import CoreTuning
from fcse.methods.sscl import SSCL
from fcse.objectives import FocalInfoNCE, InfoNCE, Recorded
from fcse.study.report import load_runs
from fcse.training import TrainConfig, read_run, train
from fcse.widgets import AblationPanel


@dataclass(frozen=True)
class Mine:
    """Pushes on what is similar already: s + gamma s^3, over a temperature."""

    gamma: float = 0.5
    temperature: float = 0.05

    def logits(self, sim, positives):
        return (sim + self.gamma * sim**3) / self.temperature


def other_mine():
    """Another class of that name, with the same fields."""

    @dataclass(frozen=True)
    class Mine:
        gamma: float = 0.5
        temperature: float = 0.05

        def logits(self, sim, positives):
            return (sim + self.gamma * sim**2) / self.temperature

    return Mine


@pytest.fixture
def sim():
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.rand(6, 9, dtype=torch.float64, generator=generator) - 1


@pytest.fixture
def config(tiny_config, tmp_path):
    return tiny_config(tmp_path / "run", objective=Mine(0.1))


def test_it_has_the_loss_and_the_pulls_of_its_logits(sim):
    value = losses.loss(sim, Mine(0.1))
    rows = Mine(0.1).logits(sim, None)
    assert value.item() == pytest.approx(-rows.log_softmax(1).diagonal().mean().item())
    x = sim.clone().requires_grad_()
    (automatic,) = torch.autograd.grad(losses.loss(x, Mine(0.1)), x)
    torch.testing.assert_close(losses.gradient_weights(sim, Mine(0.1)), automatic)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_it_has_a_chunked_loss(chunk_size):
    generator = torch.Generator().manual_seed(1)
    u, v = (torch.randn(n, 5, dtype=torch.float64, generator=generator) for n in (6, 9))
    u, v = u.requires_grad_(), v.requires_grad_()
    whole = losses.loss(losses.similarity_matrix(u, v), Mine(2.0))
    chunked = losses.chunked_loss(u, v, Mine(2.0), chunk_size=chunk_size)
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-12)
    expected = torch.autograd.grad(whole, (u, v))
    torch.testing.assert_close(torch.autograd.grad(chunked, (u, v)), expected)


def test_it_has_curves_and_a_resting_point_where_its_slope_turns():
    curve = analysis.curve(Mine(1.0))
    s = curve["similarity"]
    assert curve["slope"].to_numpy() == pytest.approx(((1 + 3 * s**2) / 0.05).to_numpy())
    assert analysis.resting_point(Mine(1.0)) is None

    @dataclass(frozen=True)
    class Parabola:
        def logits(self, sim, positives):
            return (sim - 0.25) ** 2

    assert analysis.resting_point(Parabola()) == pytest.approx(0.25)


def test_it_has_a_place_in_the_panel(sim):
    panel = AblationPanel(sim[:, :6], [f"sentence {i}" for i in range(6)], own=[Mine(2.0)])
    before = panel.png
    panel.presets["Mine (gamma=2.0)"].click()
    assert panel.png != before
    assert panel.config.objective == Mine(2.0)
    assert panel.config.name == "Mine (gamma=2.0)"
    assert "Mine (gamma=2.0)" in panel.alt
    panel.m.value = 0.5  # a control of the kit's objectives
    assert panel.config.objective == FocalInfoNCE(m=0.5)


def test_it_trains_and_goes_on_after_a_kill(config, tmp_path):
    whole = train(replace(config, output=str(tmp_path / "whole")))
    assert whole.config.name == "Mine (gamma=0.1)"
    train_until_killed(config, 5)
    steps = []
    again = train(config, lambda step, encoder: steps.append(step))
    assert steps == [4, 5, 6]
    assert again.losses == whole.losses
    assert again.record["weights"] == whole.record["weights"]


@dataclass(frozen=True)
class Scaled:
    """Settings that JSON gives back as others: a tuple as a list."""

    scales: tuple[float, ...] = (20.0, 30.0)
    inner: Mine = Mine(0.3)

    def logits(self, sim, positives):
        return self.inner.logits(sim, positives) * self.scales[0]


def test_its_settings_may_be_more_than_numbers(config):
    config = replace(config, objective=Scaled((10.0, 40.0)), steps=2)
    run = train(config)
    assert train(config).losses == run.losses
    assert run.config.name == read_run(run.folder).config.name
    assert run.config.settings == read_run(run.folder).config.settings
    for other in (Scaled((10.0, 50.0)), Scaled((10.0, 40.0), Mine(0.4))):
        assert TrainConfig(objective=other).name != TrainConfig(objective=config.objective).name
        with one_line_refusal("another run"):
            train(replace(config, objective=other))


def test_its_run_is_shown_from_the_record_alone(config, capsys):
    run = train(config)
    settings = json.loads((run.folder / "run.json").read_text())["config"]
    assert settings["objective"] == "mine"
    assert settings["mine.gamma"] == 0.1
    read = read_run(run.folder)
    assert isinstance(read.config.objective, Recorded)
    assert read.config.name == "Mine (gamma=0.1)"
    assert read.losses == run.losses
    with one_line_refusal("known by its record only"):
        losses.loss(torch.eye(3), read.config.objective)
    cli.main(["report", str(run.folder)])
    assert "Mine (gamma=0.1)" in capsys.readouterr().out
    kept = {".json", ".jsonl", ".safetensors", ".md"}
    assert {p.suffix for p in run.folder.rglob("*") if p.is_file()} <= kept


def test_two_classes_of_one_name_are_two_rows(config, tmp_path):
    theirs = other_mine()
    for folder, objective in (("a", Mine()), ("b", theirs()), ("c", Mine())):
        train(replace(config, objective=objective, steps=2, output=str(tmp_path / folder)))
    runs = load_runs(tmp_path)
    assert runs["name"].nunique() == 2
    assert all(name.startswith("Mine [code ") for name in runs["name"])
    with one_line_refusal("another run .*mine.code"):
        train(replace(config, objective=theirs(), steps=2, output=str(tmp_path / "a")))


def test_rows_that_depend_on_each_other_are_refused(config):
    @dataclass(frozen=True)
    class Centred:
        def logits(self, sim, positives):
            return sim - sim.mean()

    with one_line_refusal("rows depend on each other in Centred"):
        train(replace(config, objective=Centred()))
    assert not config.folder.exists()


CELL = """
import json, sys
from dataclasses import dataclass, replace
from pathlib import Path
import torch
from fcse.training import train
from fcse.widgets import AblationPanel, TrainingPanel

POWER = 2

@dataclass(frozen=True)
class Cell:
    gamma: float = 1.0
    def logits(self, sim, positives):
        return sim * abs(sim) ** POWER * self.gamma / 0.05

encoder, corpus, folder = sys.argv[1:]
panel = AblationPanel(torch.rand(4, 4), list("abcd"), own=[Cell(0.5)])
panel.set_to("Cell (gamma=0.5)")
config = replace(panel.config, encoder=encoder, corpus=corpus, batch_size=8, steps=3,
                 eval_steps=3, max_length=16, precision="float32", checkpoints=False)
apart = TrainingPanel(lambda: config)
apart.start()
apart.wait(600)
assert "Trained" in apart.message, apart.message
here = train(replace(config, output=folder))
said = {"apart": apart.finished[0].losses, "here": here.losses, "name": config.name}
apart.start()  # this class is the one whose run is there
Path(folder, "said.json").write_text(json.dumps(said | {"again": apart.message}))
"""
READER = """
import sys
loaded = []
sys.addaudithook(lambda event, of: loaded.append(of) if event == "pickle.find_class" else None)
from fcse import cli, losses
from fcse.study.report import load_runs
from fcse.training import read_run
import torch
folder = sys.argv[1]
run = read_run(folder)
print("read", run.config.name, run.losses, run.encoder.encode(["A text."]).shape)
cli.main(["report", folder])
assert not loaded, loaded
losses.loss(torch.eye(3), run.config.objective)
"""


def test_one_from_a_cell_trains_in_the_panels_process_and_is_shown_without_its_class(
    config, tmp_path
):
    """As in a notebook, the class lives in `__main__`, where no other process finds it."""

    def script(name, text, *arguments):
        (tmp_path / name).write_text(text)
        return subprocess.run(
            [sys.executable, tmp_path / name, *map(str, arguments)],
            env=os.environ | {"FCSE_RUNS": str(tmp_path / "runs")},
            capture_output=True,
            text=True,
            timeout=900,
        )

    folder = tmp_path / "here"
    done = script("cell.py", CELL, config.encoder, config.corpus, folder)
    assert done.returncode == 0, done.stderr
    said = json.loads((folder / "said.json").read_text())
    assert said["apart"] == said["here"]
    assert len(said["here"]) == 3
    assert said["name"] == "Cell (gamma=0.5)"
    assert said["again"] == "This run was there already: it is in the table."
    (trained,) = (tmp_path / "runs").glob("cell-seed0-*")
    settings = [json.loads((path / "run.json").read_text())["config"] for path in (trained, folder)]
    assert settings[0] == settings[1]

    done = script("reader.py", READER, trained)
    read, *report = done.stdout.splitlines()
    assert read == f"read Cell (gamma=0.5) {said['here']} (1, 32)"
    assert any(line.startswith("Lee ") and " Cell (gamma=0.5) " in line for line in report)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "InputError: Cell (gamma=0.5) is known by its record only: define it again to use it"
    )


def test_what_is_no_objective_is_one_line():
    with one_line_refusal("is none: give a name"):
        TrainConfig(objective=Mine)
    with one_line_refusal("unknown objective 'triplet'"):
        TrainConfig(objective="triplet")


def test_its_parameters_are_its_own():
    """A flag beside it says nothing about it; its own settings go by its name."""
    config = TrainConfig(objective=Mine(0.1))
    for name in ("temperature", "m", "alpha"):
        with one_line_refusal(rf"{name} beside the objective Mine \(gamma=0\.1\)"):
            configured(config, {name: 0.2})
    assert configured(config, {"mine.temperature": 1, "sscl.layers": 2}) == TrainConfig(
        objective=Mine(0.1, 1.0), methods=(SSCL(2),)
    )
    with one_line_refusal("mine.gamma must be a number, got 'x'"):
        configured(config, {"mine.gamma": "x"})
    plain = configured(config, {"objective": "info_nce", "temperature": 0.2})
    assert plain == TrainConfig(objective=InfoNCE(0.2))


def test_it_goes_with_the_kits_methods(config):
    run = train(replace(config, objective=Mine(0.1), methods=(SSCL(2), CoreTuning(mixing=False))))
    assert run.config.name == "Mine (gamma=0.1) + Core-tuning (mixing=False) + SSCL"
    assert read_run(run.folder).config.methods == run.config.methods
