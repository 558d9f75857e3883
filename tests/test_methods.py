"""The neighbours in training: by name, together, switched off, and after a kill."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import one_line_refusal

from fcse import losses, plots
from fcse.config import TrainConfig
from fcse.corpora import TokenizedCorpus
from fcse.encoder import SentenceEncoder
from fcse.grid import canonical
from fcse.neighbours.batches import Batches, embed
from fcse.neighbours.options import OFF, SETTINGS
from fcse.report import load_runs
from fcse.training import train

TOGETHER = {"layers": 2, "neighbours": 3, "acceptance": 0.8, "clusters": 5, "cluster_steps": 2}
"""Settings that change different things, all at once."""


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def config(tiny_model, small_corpus, tmp_path):
    return TrainConfig(
        objective="info_nce",
        encoder=str(tiny_model("bert")),
        corpus=str(small_corpus),
        batch_size=8,
        steps=6,
        learning_rate=1e-3,
        max_length=16,
        eval_steps=3,
        clusters=5,
        cluster_steps=2,
        teacher=str(tiny_model("bert")),
        precision="float32",
        output=str(tmp_path / "run"),
    )


def elsewhere(config, tmp_path, name, **changes):
    return replace(config, output=str(tmp_path / name), **changes)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_name_stands_for_its_settings(config, tmp_path, name):
    # Two clusters and half a corpus a batch: three kept labels in it are enough for a pair.
    config = replace(config, batch_size=20, clusters=2, cluster_steps=1)
    by_name = train(replace(config, objective=name))
    set_ = elsewhere(config, tmp_path, "set", **SETTINGS[name])
    assert by_name.config.key == set_.key == name
    assert train(set_).losses == by_name.losses
    plain = train(elsewhere(config, tmp_path, "plain"))
    assert by_name.losses != plain.losses
    off = elsewhere(config, tmp_path, "off", objective=name, **{k: OFF[k] for k in SETTINGS[name]})
    assert off.key == "info_nce"
    assert train(off).losses == plain.losses


def test_a_grid_knows_a_name_from_its_settings(config):
    for name, settings in SETTINGS.items():
        by_name = canonical(replace(config, objective=name))
        assert by_name == canonical(replace(config, **settings))
        assert by_name.key == name
        assert by_name != canonical(config)
    off = replace(config, objective="adap_acse", margin=0.0, teacher="somewhere/else")
    assert canonical(off) == canonical(replace(config, teacher="minilm"))


def test_a_report_sets_them_side_by_side(config, tmp_path):
    for name in ("info_nce", "sscl", "focal_info_nce"):
        train(elsewhere(config, tmp_path, name, objective=name))
    train(elsewhere(config, tmp_path, "both", objective="focal_info_nce", layers=1))
    train(elsewhere(config, tmp_path, "two", objective="sscl", layers=2))
    runs = load_runs(tmp_path)
    known = runs[runs["folder"].map(lambda path: path.name) != "two"]
    assert known["settings"].nunique() == 1
    assert known["objective"].tolist() == [
        "info_nce",
        "focal_info_nce",
        "focal_info_nce+sscl",
        "sscl",
    ]
    assert runs["settings"].nunique() == 2
    assert plots.NAMES["focal_info_nce+sscl"] == "Focal-InfoNCE + SSCL"
    assert plots.COLOURS["focal_info_nce+sscl"] != plots.COLOURS["focal_info_nce"]


def test_they_combine_with_each_other_and_the_modulation(config):
    run = train(replace(config, objective="focal_info_nce", margin=0.05, **TOGETHER))
    assert run.config.key == "focal_info_nce+sscl+cards+adap_acse+ifnd"
    assert np.isfinite(run.losses).all()
    assert run.record["weights"]["first"] != run.record["weights"]["last"]


def test_a_run_with_labels_goes_on_as_undisturbed(config, tmp_path):
    together = replace(config, **TOGETHER)
    undisturbed = train(elsewhere(together, tmp_path, "undisturbed"))

    def stop(step, encoder):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(together, stop)
    again = train(together)
    assert again.losses == undisturbed.losses
    assert again.record["weights"] == undisturbed.record["weights"]


def test_micro_batches_give_the_same_losses(config, still_model, tmp_path):
    still = replace(config, encoder=str(still_model), margin=0.1, **TOGETHER)
    whole = train(still)
    parts = train(elsewhere(still, tmp_path, "parts", micro_batch_size=3))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


@pytest.fixture
def made(config):
    """Settings -> the encoder, its corpus and its batches."""

    def make(**changes):
        changed = replace(config, **changes)
        encoder = SentenceEncoder.from_pretrained(changed.encoder, "cls", 0)
        corpus = TokenizedCorpus.load(changed.corpus, encoder, changed.max_length)
        return encoder, corpus, Batches(changed, encoder, corpus)

    return make


def test_plain_batches_hold_nothing_more(made):
    _, corpus, batches = made()
    rows = np.arange(8)
    batch = batches.at(1, rows)
    assert batch.sentences == corpus.batch(rows)[0]
    assert batch.teacher is None
    assert batch.sentence_ids is None
    assert all(item[1:] == (None, None) for item in batch.items)


def test_retrieved_negatives_are_near_and_others(made):
    encoder, corpus, batches = made(neighbours=3)
    unit = embed(encoder, corpus).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    third = np.sort(cosines, axis=1)[:, -3]
    _, token_ids = corpus.batch(np.arange(len(corpus)))
    rows = np.arange(8)
    drawn = set()
    for step in range(1, 20):
        for row, item in zip(rows, batches.at(step, rows).items, strict=True):
            found = token_ids.index(item.retrieved)
            assert cosines[row, found] >= third[row] - 1e-3
            drawn.add((row, found))
    assert len(drawn) > len(rows), "always the same neighbour"
    again = made(neighbours=3)[2]
    assert again.at(7, rows).items == batches.at(7, rows).items


def test_labels_come_with_time_and_mask_their_pairs(made):
    encoder, corpus, batches = made(acceptance=0.8)
    rows = np.arange(8)
    batches.cluster(1, encoder)
    assert batches.labels is None
    batches.cluster(5, encoder)
    labels = batches.labels
    assert (labels >= 0).sum() == int(0.8 * 4 / 6 * len(corpus))
    ids = batches.at(5, rows).sentence_ids[-1]
    for i in range(8):
        for j in range(8):
            same = i == j or (labels[i] >= 0 and labels[i] == labels[j])
            assert (ids[i] == ids[j]) == same


def test_case_is_switched_in_the_second_view_alone(made, tiny_model):
    encoder, _, batches = made(encoder=str(tiny_model("roberta")), case_switch=1.0)
    batch = batches.at(1, np.arange(8))
    for sentence, item in zip(batch.sentences, batch.items, strict=True):
        (plain,) = encoder.tokenize([sentence], 16)
        assert item.token_ids == plain
        assert item.second != plain
        swapped = encoder.tokenizer.decode(item.second, skip_special_tokens=True)
        assert swapped.strip()[0] == sentence[0].swapcase()


def test_lower_layers_go_through_the_same_head(config, made):
    encoder, corpus, _ = made()
    encoder.eval()
    token_ids = corpus.batch(np.arange(8))[1]
    with torch.no_grad():
        u, v, lower = encoder(token_ids, layers=2)
        assert lower.shape == (8, 4, u.shape[1])
        assert torch.equal(u, v)
        for i, ids in enumerate(token_ids):
            hidden = encoder.backbone(torch.tensor([ids]), output_hidden_states=True).hidden_states
            for layer in (1, 2):
                expected = encoder.head(hidden[-1 - layer][0, 0])
                for view in (0, 2):
                    torch.testing.assert_close(lower[i, view + layer - 1], expected)


def test_the_loss_with_lower_layers_is_the_mean_of_two(config, made):
    from fcse.training import _loss

    encoder, _, batches = made(layers=1)
    encoder.eval()
    batch = batches.at(1, np.arange(8))
    with torch.no_grad():
        u, v, lower = encoder([item.token_ids for item in batch.items], layers=1)
        found = _loss(batches.config, batch, u, v, lower)
        plain = losses.info_nce(losses.similarity_matrix(u, v))
        more = torch.cat([v, lower.flatten(0, 1)])
        extended = losses.info_nce(losses.similarity_matrix(u, more))
    assert found.item() == pytest.approx((plain + extended).item() / 2, rel=1e-5)
    assert extended > plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbours": 40}, "k must be from 1 to"),
        ({"acceptance": 0.5, "clusters": 41}, "clusters must be at most 40"),
        ({"case_switch": 0.1}, "needs a cased vocabulary"),
        ({"margin": 0.1, "teacher": "no/such/teacher"}, "no/such/teacher"),
        ({"layers": 3}, "layers"),
    ],
)
def test_what_cannot_be_is_one_line(config, changes, message):
    with one_line_refusal(message):
        train(replace(config, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixing": True, "layers": 1}, "mixing takes each row's own negatives"),
        ({"detection": 0.005, "micro_batch_size": 4}, "detection needs a batch in one pass"),
        ({"acceptance": 1.5}, "acceptance must lie between 0 and 1"),
        ({"margin": 2.0}, "margin must be an angle from 0 to below pi/2"),
        ({"layers": -1}, "layers must be at least 0"),
    ],
)
def test_what_does_not_go_together_is_one_line(config, changes, message):
    with one_line_refusal(message):
        replace(config, **changes)
