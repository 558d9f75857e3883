"""A reader's own objective, ten lines of it: everything that the kit's objectives have."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import one_line_refusal

from fcse import analysis, cli, losses
from fcse.losses import FocalInfoNCE
from fcse.objectives import Recorded
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

    def stop(step, encoder):
        if step == config.steps - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, stop)
    again = train(config)
    assert again.losses == whole.losses
    assert again.record["weights"] == whole.record["weights"]


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
    assert not [p for p in run.folder.rglob("*") if p.suffix in (".pkl", ".pt", ".bin")]


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


SCRIPT = """
import sys
from dataclasses import dataclass, replace
from fcse.config import TrainConfig
from fcse.widgets import TrainingPanel

@dataclass(frozen=True)
class Cell:
    gamma: float = 1.0
    def logits(self, sim, positives):
        return sim * abs(sim) * self.gamma / 0.05

if __name__ == "__main__":
    encoder, corpus = sys.argv[1:]
    config = TrainConfig(objective=Cell(0.5), encoder=encoder, corpus=corpus, batch_size=8,
                         steps=3, max_length=16, eval_steps=3, precision="float32")
    panel = TrainingPanel(lambda: config)
    panel.start()
    panel.wait(600)
    print(panel.message, len(panel.finished[0].losses), panel.finished[0].config.name)
"""


def test_one_from_a_cell_reaches_the_panels_process(config, tmp_path):
    """As in a notebook, the class lives in `__main__`, where no other process finds it."""
    script = tmp_path / "cell.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(config.encoder), str(config.corpus)],
        env=os.environ | {"FCSE_RUNS": str(tmp_path / "runs")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert "Trained: it is in the table. 3 Cell (gamma=0.5)" in done.stdout, done.stderr


def test_what_is_no_objective_is_one_line():
    with one_line_refusal("is none: give a name"):
        TrainConfig(objective=Mine)
    with one_line_refusal("unknown objective 'triplet'"):
        TrainConfig(objective="triplet")
