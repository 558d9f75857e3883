"""Every recipe's own path on every architecture, and what the recipes' sources publish."""

import json
import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from conftest import CONFIGS

from fcse.config import TrainConfig
from fcse.data import load_lee, load_sts
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError
from fcse.evaluation import judge
from fcse.objectives import FocalInfoNCE
from fcse.recipes import RECIPES, recipe
from fcse.training import train


@pytest.fixture(scope="module")
def small_senteval(tmp_path_factory):
    """A SentEval folder whose STSBenchmark holds Lee's judged pairs, on its scale of 0 to 5."""
    root = tmp_path_factory.mktemp("senteval")
    folder = root / "STS" / "STSBenchmark"
    folder.mkdir(parents=True)
    lee = load_lee()
    texts = [[" ".join(text.split()) for text in side] for side in (lee.left, lee.right)]
    pairs = list(zip(*texts, (5 * lee.gold).tolist(), strict=True))
    # The splits are pairs of their own; the dev split is the largest.
    for split, rows in (("train", pairs[:50]), ("dev", pairs[50:350]), ("test", pairs[350:400])):
        lines = [
            f"main-news\tlee\t2005\t{i:04}\t{gold!r}\t{left}\t{right}\n"
            for i, (left, right, gold) in enumerate(rows)
        ]
        (folder / f"sts-{split}.csv").write_text("".join(lines), encoding="utf-8")
    return root


# Beside their backbone, batch and learning rate the paper's four are one recipe.
PAPER = [name for name, config in RECIPES.items() if config.corpus == "wiki1m"]
EVERYWHERE = [name for name in RECIPES if name not in PAPER[1:]]


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        *product(EVERYWHERE, CONFIGS),
        *((name, RECIPES[name].encoder.partition("-")[0]) for name in PAPER[1:]),
    ],
)
def test_a_recipe_runs(
    name, architecture, tiny_model, small_corpus, small_senteval, monkeypatch, tmp_path
):
    monkeypatch.setenv("FCSE_SENTEVAL", str(small_senteval))
    config = replace(
        recipe(name),
        encoder=str(tiny_model(architecture)),
        corpus=str(small_corpus),
        steps=2,
        batch_size=8,
        eval_steps=1,
        output=str(tmp_path / "run"),
    )
    result = train(config)
    assert len(result.losses) == 2
    assert all(map(math.isfinite, result.losses))
    assert result.record["finished"]
    assert result.record["config"]["recipe"] == name
    assert result.record["weights"]["first"] != result.record["weights"]["last"]
    assert [line["step"] for line in result.evaluations] == [0, 1, 2]

    judged = {"lee": load_lee()}
    if config.metric == "stsb_dev":
        judged["stsb_dev"] = load_sts("STSBenchmark", "dev", small_senteval)
        assert len(judged["stsb_dev"]) == 300
        best = max(result.evaluations[1:], key=lambda line: line["stsb_dev"])
        assert result.record["scores"]["stsb_dev"] == best["stsb_dev"]
    kept = SentenceEncoder.from_pretrained(tmp_path / "run" / "model")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert len(record["scores"]) == 3 * len(judged)
    for task, pairs in judged.items():
        again = judge(kept, pairs)
        assert record["scores"][task] == pytest.approx(again["spearman"], abs=1e-3)
        for part in ("alignment", "uniformity"):
            assert record["scores"][f"{task}_{part}"] == pytest.approx(again[part], abs=1e-4)


def test_a_recipe_of_the_paper_needs_its_development_set(
    tiny_model, small_corpus, no_sts_data, tmp_path
):
    config = replace(
        recipe("bert-base-focal"),
        encoder=str(tiny_model("bert")),
        corpus=str(small_corpus),
        steps=2,
        batch_size=8,
        output=str(tmp_path / "run"),
    )
    with pytest.raises(InputError, match="no STS data"):
        train(config)
    assert not Path(config.output).exists()


PUBLISHED = {
    # Gao et al. 2021, the authors' README: batch size and learning rate for each backbone.
    "bert-base-focal": ("bert-base-uncased", 64, 3e-5),
    "bert-large-focal": ("bert-large-uncased", 64, 1e-5),
    "roberta-base-focal": ("roberta-base", 512, 1e-5),
    "roberta-large-focal": ("roberta-large", 512, 3e-5),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_of_the_paper(name):
    config = recipe(name)
    assert (config.encoder, config.batch_size, config.learning_rate) == PUBLISHED[name]
    assert config.objective == FocalInfoNCE(0.05, 0.3, modulate="both", stop_gradient=False)
    assert (config.methods, config.max_length) == ((), 32)
    assert (config.corpus, config.metric, config.eval_steps) == ("wiki1m", "stsb_dev", 125)
    assert config.pooling == "cls"
    assert config.steps * config.batch_size <= 1_000_000 < (config.steps + 1) * config.batch_size
    # Of a step's sentences the remainder of the million is the most that is not seen.
    assert config.steps == {64: 15_625, 512: 1_953}[config.batch_size]


def test_there_are_no_other_recipes_of_the_paper():
    assert {name for name, config in RECIPES.items() if config.corpus == "wiki1m"} == set(PUBLISHED)


def test_the_default_recipe_is_the_default_config():
    config = replace(recipe("minilm-wiki"), recipe=None)
    assert config == TrainConfig()
    assert (config.encoder, config.corpus, config.metric) == ("minilm", "wiki-mini", "last")


def test_recipes_name_themselves():
    assert all(config.recipe == name for name, config in RECIPES.items())
    with pytest.raises(InputError, match="minilm-wiki"):
        recipe("none-such")
