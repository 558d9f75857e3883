"""The run picker: what is offered, what is loaded, and what is said where that fails."""

from dataclasses import replace

import pytest
import torch

from fcse.encoder.sentence_encoder import weights_hash
from fcse.errors import InputError
from fcse.objectives import FocalInfoNCE
from fcse.training import train
from fcse.widgets import RunPicker, SeedsPicker


@pytest.fixture
def trained(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setenv("FCSE_RUNS", str(tmp_path / "runs"))
    config = tiny_config("-", recipe="minilm-short", objective="info_nce", steps=2)
    return train(replace(config, output=None))


def test_fresh_runs_runs_that_are_there_and_a_name_are_offered(trained):
    picker = RunPicker()
    labels = list(picker.choice.options)
    assert labels[0] == "fresh short runs of both losses"
    assert labels[1] == trained.folder.name
    assert labels[-1] == "an encoder by its name:"
    assert picker.source == "minilm-short"


def test_a_run_is_loaded(trained):
    picker = RunPicker()
    picker.choice.value = str(trained.folder)
    assert "is picked" in picker.message
    assert picker.runs["InfoNCE"].losses == trained.losses
    assert RunPicker(trained.folder).runs["InfoNCE"].losses == trained.losses


def test_an_encoder_is_loaded_by_name(trained, tiny_model):
    picker = RunPicker()
    picker.name.value = str(tiny_model("roberta"))
    assert picker.choice.value == ""
    (run,) = picker.runs.values()
    assert run.encoder.backbone.config.model_type == "roberta"
    first = weights_hash(run.encoder)
    picker.choice.value = str(trained.folder)
    picker.name.value = str(tiny_model("bert"))
    assert picker.runs["chosen encoder"].encoder.backbone.config.model_type == "bert"
    assert weights_hash(picker.runs["chosen encoder"].encoder) != first


@pytest.mark.usefixtures("no_sts_data")
def test_what_cannot_be_loaded_is_said_and_nothing_is_lost(trained, tmp_path):
    picker = RunPicker(trained.folder)
    before = picker.runs["InfoNCE"]
    picker.name.value = "no/such-<model>"
    assert "'no/such-<model>' could not be loaded" in picker.message
    assert "<model>" not in picker.widget.children[2].value
    (trained.folder / "model/model.safetensors").write_bytes(b"broken")
    other = RunPicker()
    other.choice.value = str(trained.folder)
    assert "is damaged" in other.message
    assert other.source == "minilm-short"
    assert picker.runs["InfoNCE"] is before
    assert torch.isfinite(torch.tensor(picker.runs["InfoNCE"].losses)).all()
    with pytest.raises(InputError):
        RunPicker("no/such-model").runs  # noqa: B018


@pytest.fixture
def seeds(trained):
    """The folder of runs of both losses with seeds 0 and 1, and trials with other settings."""
    for seed in (0, 1):
        for objective in ("info_nce", "focal_info_nce"):
            train(replace(trained.config, seed=seed, objective=objective))
    train(replace(trained.config, objective=FocalInfoNCE(0.2)))
    train(replace(trained.config, learning_rate=2e-3))
    return trained.folder.parent


def test_seeds_of_both_losses_are_read_from_a_folder(seeds):
    runs = SeedsPicker(seeds, seeds=[0, 1, 2]).runs
    assert sorted(zip(runs["name"], runs["seed"], strict=True)) == [
        ("Focal-InfoNCE", 0),
        ("Focal-InfoNCE", 1),
        ("InfoNCE", 0),
        ("InfoNCE", 1),
    ]
    picker = SeedsPicker(seeds=[0, 1])
    assert picker.source == "minilm-short"
    assert "seeds 0, 1" in next(iter(picker.choice.options))
    picker.name.value = str(seeds)
    assert "is picked" in picker.message
    assert len(picker.runs) == 4


def test_a_folder_without_seeds_of_both_losses_is_refused(seeds, tmp_path):
    picker = SeedsPicker(seeds, seeds=[0, 1])
    before = picker.runs
    for folder, said in (
        (tmp_path / "nowhere", "no folder of runs"),
        (next(seeds.glob("focal*seed1*")), "no two of the seeds"),
    ):
        picker.name.value = str(folder)
        assert said in picker.message
        assert picker.runs is before
    next(seeds.glob("focal*seed1*/run.json")).write_bytes(b"\xff broken")
    picker.name.value = str(seeds)
    assert "run.json is no record of a run" in picker.message
    with pytest.raises(InputError):
        SeedsPicker(seeds, recipe="minilm-wiki", seeds=[0, 1]).runs  # noqa: B018
