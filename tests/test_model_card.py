"""The model card of a run, and the scores that run.json and the card give of the kept weights."""

import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from huggingface_hub import ModelCard

from fcse.data import load_lee
from fcse.encoder import SentenceEncoder
from fcse.encoder.card import write_card
from fcse.evaluation import judge
from fcse.methods.adap_acse import AdapACSE
from fcse.recipes import recipe
from fcse.training import load_run, train


@pytest.fixture
def config(tiny_model, small_corpus, tmp_path):
    return replace(
        recipe("minilm-wiki"),
        encoder=str(tiny_model("bert")),
        corpus=str(small_corpus),
        steps=2,
        batch_size=8,
        eval_steps=1,
        seed=3,
        output=str(tmp_path / "run"),
    )


def card_of(result):
    return ModelCard.load(result.folder / "model" / "README.md")


def absolute_paths(text):
    """Paths from the root, on any system; a slash inside a name or an address is none."""
    return re.findall(r"(?<![\w./:-])(?:/[\w.-]+)+|\b[A-Za-z]:\\\S*|file://\S*", text)


def rows_of(text):
    return dict(re.findall(r"^\| (.+?) \| (.*) \|$", text, flags=re.MULTILINE))


def test_the_card_says_what_the_model_is(config):
    result = train(config)
    card = card_of(result)
    assert card.data.base_model == "bert"
    assert card.data.library_name == "sentence-transformers"
    assert card.data.pipeline_tag == "sentence-similarity"
    assert card.data.model_name == "minilm-wiki, seed 3"
    scores = {entry.dataset_name: entry.metric_value for entry in card.data.eval_results}
    assert scores == {"lee": round(result.record["scores"]["lee"], 2)}

    raw = card.data.to_dict()["model-index"][0]["results"][0]
    assert raw["metrics"] == [{"type": "spearman", "value": scores["lee"]}]
    # What a hub would have to know of the text: one header, and nothing before it.
    assert card.content.count("\n---\n") == 1
    assert card.text.strip().startswith("# minilm-wiki, seed 3\n")


def test_the_card_names_what_decided_the_run(config):
    result = train(config)
    record = json.loads((result.folder / "run.json").read_text())
    rows = rows_of(card_of(result).text)
    assert len(record["versions"]) >= 5
    for part in (record["versions"], record["scores"]):
        for name, value in part.items():
            assert rows[name] == (value if isinstance(value, str) else f"{value:.2f}")
    set_ = {name: value for name, value in record["config"].items() if value is not None}
    for name in set_.keys() - {"encoder", "corpus", "precision"}:
        assert rows[name] == str(set_[name])
    assert rows["precision"] == record["precision"]
    assert rows["recipe"] == "minilm-wiki"
    assert rows["seed"] == "3"
    assert rows["encoder"] == "bert"
    assert rows["corpus"] == Path(config.corpus).name
    assert rows["corpus sha256"] == record["corpus"]["sha256"]
    assert rows["kept_step"] == str(record["kept_step"]) == "2"


def test_a_run_without_a_recipe_has_a_card(config):
    card = card_of(train(replace(config, recipe=None, objective="info_nce", pooling="mean_top2")))
    assert card.data.model_name == "info_nce, seed 3"
    assert "recipe" not in rows_of(card.text)
    assert "by `mean_top2` pooling" in " ".join(card.text.split())


def test_the_packaged_encoder_is_named_by_its_name_on_the_hub(config):
    result = train(config)
    record = result.record | {"config": result.record["config"] | {"encoder": "minilm"}}
    write_card(result.folder / "model", record)
    card = card_of(result)
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert rows_of(card.text)["encoder"] == "sentence-transformers/all-MiniLM-L6-v2"


def test_names_on_the_hub_are_given_as_they_are(config):
    result = train(config)
    names = {"encoder": "bert-base-uncased", "corpus": "someone/some-text:sentence"}
    write_card(result.folder / "model", result.record | {"config": result.record["config"] | names})
    rows = rows_of(card_of(result).text)
    assert {name: rows[name] for name in names} == names


def test_the_pattern_for_absolute_paths():
    for path in ("/srv/data/a.txt", "C:\\data", "file:///srv", "/srv"):
        assert absolute_paths(f"| corpus | {path} |")
        assert absolute_paths(f"base_model: {path}\n")
    assert not absolute_paths("https://arxiv.org/abs/2310.06918 path/to/this/folder name/model")


@pytest.mark.parametrize("as_given", [str, Path])
def test_the_card_holds_no_absolute_path(as_given, config):
    encoder, corpus = as_given(config.encoder), as_given(config.corpus)
    assert Path(encoder).is_absolute()
    teacher = (AdapACSE(teacher=encoder),)
    card = card_of(train(replace(config, encoder=encoder, corpus=corpus, methods=teacher)))
    assert absolute_paths(card.content) == []
    assert rows_of(card.text)["adap_acse.teacher"] == "bert"


def test_of_a_dataset_folder_the_card_holds_no_absolute_path(config, sentences, tmp_path):
    rows = datasets.Dataset.from_dict({"sentence": sentences[:40]})
    rows.save_to_disk(str(tmp_path / "rows"))
    card = card_of(train(replace(config, corpus=f"{tmp_path / 'rows'}:sentence")))
    assert rows_of(card.text)["corpus"] == "rows:sentence"
    assert absolute_paths(card.content) == []


def test_relative_names_are_kept_short(config, monkeypatch):
    # From within the encoder's own folder "." names it.
    monkeypatch.chdir(config.encoder)
    card = card_of(train(replace(config, encoder=".")))
    assert card.data.base_model == "bert"


@pytest.mark.parametrize("metric", ["last", "lee"])
def test_the_scores_are_those_of_the_kept_weights(metric, config, tmp_path):
    # At a rate this high the score goes up and down, and for most seeds the last is not the best.
    config = replace(config, metric=metric, steps=4, learning_rate=3e-2)
    kept = set()
    for seed in range(3):
        result = train(replace(config, seed=seed, output=str(tmp_path / f"seed{seed}")))
        metrics = (result.folder / "metrics.jsonl").read_text().splitlines()
        scored = [line for line in map(json.loads, metrics) if "lee" in line][1:]
        last = scored[-1]
        expected = last if metric == "last" else max(scored, key=lambda line: line["lee"])
        record = json.loads((result.folder / "run.json").read_text())
        assert {"step": record["kept_step"]} | record["scores"] == expected
        encoder = SentenceEncoder.from_pretrained(result.folder / "model")
        again = judge(encoder, load_lee())
        assert again["spearman"] == pytest.approx(record["scores"]["lee"], abs=1e-3)
        assert again["uniformity"] == pytest.approx(record["scores"]["lee_uniformity"], abs=1e-4)
        assert card_of(result).data.eval_results[0].metric_value == round(expected["lee"], 2)
        kept.add(record["kept_step"])
    assert (kept == {4}) == (metric == "last")


def test_a_loaded_run_has_its_card_and_scores(config):
    first = train(config)
    before = card_of(first).content
    again = load_run(config)
    assert card_of(again).content == before
    score = judge(again.encoder, load_lee())["spearman"]
    assert again.record["scores"]["lee"] == pytest.approx(score, abs=1e-3)
