"""The run picker: what is offered, what is loaded, and what is said where that fails."""

from dataclasses import replace

import pytest
import torch

from fcse.errors import InputError
from fcse.recipes import recipe
from fcse.runs import weights_hash
from fcse.training import train
from fcse.widgets import RunPicker


@pytest.fixture
def trained(tiny_model, small_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("FCSE_RUNS", str(tmp_path / "runs"))
    short = recipe("minilm-short")
    tiny = {"encoder": str(tiny_model("bert")), "corpus": str(small_corpus), "batch_size": 8}
    return train(replace(short, **tiny, steps=2, objective="info_nce"))


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
    assert picker.runs["info_nce"].losses == trained.losses
    assert RunPicker(trained.folder).runs["info_nce"].losses == trained.losses


def test_an_encoder_is_loaded_by_name(trained, tiny_model):
    picker = RunPicker()
    picker.name.value = str(tiny_model("roberta"))
    assert picker.choice.value == ""
    (run,) = picker.runs.values()
    assert run.encoder.backbone.config.model_type == "roberta"
    first = weights_hash(run.encoder)
    picker.choice.value = str(trained.folder)
    picker.name.value = str(tiny_model("bert"))
    assert picker.runs["encoder"].encoder.backbone.config.model_type == "bert"
    assert weights_hash(picker.runs["encoder"].encoder) != first


@pytest.mark.usefixtures("no_sts_data")
def test_what_cannot_be_loaded_is_said_and_nothing_is_lost(trained, tmp_path):
    picker = RunPicker(trained.folder)
    before = picker.runs["info_nce"]
    picker.name.value = "no/such-<model>"
    assert "'no/such-<model>' could not be loaded" in picker.message
    assert "<model>" not in picker.widget.children[2].value
    (trained.folder / "model/model.safetensors").write_bytes(b"broken")
    other = RunPicker()
    other.choice.value = str(trained.folder)
    assert "is damaged" in other.message
    assert other.source == "minilm-short"
    assert picker.runs["info_nce"] is before
    assert torch.isfinite(torch.tensor(picker.runs["info_nce"].losses)).all()
    with pytest.raises(InputError):
        RunPicker("no/such-model").runs  # noqa: B018
