"""What a notebook looks at: a run that is there, or any encoder."""

from dataclasses import replace

import pytest

from fcse.encoder import SentenceEncoder
from fcse.errors import InputError
from fcse.evaluation import evaluate_lee
from fcse.recipes import recipe
from fcse.study import pick_runs
from fcse.training import train


def test_a_run_folder_is_picked(tiny_model, small_corpus, tmp_path):
    config = replace(
        recipe("minilm-short"),
        encoder=str(tiny_model("bert")),
        corpus=str(small_corpus),
        modulate="positive",
        batch_size=8,
        steps=2,
        output=str(tmp_path / "run"),
    )
    trained = train(config)
    (picked,) = pick_runs(tmp_path / "run").items()
    assert picked[0] == "positive"
    assert picked[1].losses == trained.losses


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_an_encoder_stands_for_a_run_of_no_steps(pooling, tiny_model, tmp_path):
    SentenceEncoder.from_pretrained(tiny_model("bert"), pooling).save_pretrained(tmp_path)
    (key, run), *rest = pick_runs(tmp_path).items()
    assert (key, rest) == ("encoder", [])
    assert run.steps == [0]
    assert run.losses == []
    assert run.encoder.pooling == run.config.pooling == pooling
    assert run.evaluations[0]["lee"] == pytest.approx(evaluate_lee(run.encoder))


@pytest.mark.usefixtures("no_sts_data")
def test_what_is_nowhere_is_refused(tmp_path):
    for source in ("no-such-model", tmp_path / "none"):
        with pytest.raises(InputError, match="could not be loaded"):
            pick_runs(source)
