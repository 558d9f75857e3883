"""The methods in training: by name, together, switched off, after a kill, and from old records."""

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import (
    CONFIGS,
    elsewhere,
    make_tokenizer,
    one_line_refusal,
    save_tiny_model,
    train_until_interrupted,
)
from sklearn.feature_extraction.text import TfidfVectorizer

from fcse import losses, methods, plots
from fcse.config import TrainConfig, configured, recorded
from fcse.methods.adap_acse import AdapACSE, Terms
from fcse.methods.cards import CARDS, switched
from fcse.methods.core_tuning import CoreTuning
from fcse.methods.debcse import DebCSE
from fcse.methods.diffcse import DiffCSE
from fcse.methods.fed_rcl import FedRCL
from fcse.methods.ifnd import IFND
from fcse.methods.iftcl import IFTCL
from fcse.methods.pnr import PNR
from fcse.methods.schedule import FOCAL, Schedule
from fcse.methods.sparse_cse import SparseCSE
from fcse.methods.sscl import SSCL
from fcse.objectives import FocalInfoNCE, InfoNCE
from fcse.study.report import load_runs
from fcse.training import train
from fcse.training.batches import compare, items, loss_of, views

pytestmark = pytest.mark.usefixtures("own_cache")

AUTHORS = {
    "sscl": SSCL(layers=2),
    "cards": CARDS("base", k=65, readout="mean", case_switch=0.05, variant=2),
    "diffcse": DiffCSE(0.005, generator="trained", batch_norm=True, all_positions=True),
    "adap_acse": AdapACSE(margin=0.15, teacher="tf-idf"),
    "ifnd": IFND(acceptance=1.0, clusters=100),
    "core_tuning": CoreTuning(focal_weight=True, mixing=True),
    "schedule": Schedule(FOCAL),
    "pnr": PNR("", pseudo_negatives=True, distillation=1.0, own_negatives=True, norm="batch"),
    "sparse_cse": SparseCSE(0.1, structured=True, remove="lowest", balance=0.5, batches=8),
    "iftcl": IFTCL(twins=10.0, queue=2, change="any", share=0.32, margin="between"),
    "debcse": DebCSE(k=32, positive_from=0.75, negative_to=0.5, gamma=1.0, teacher="minilm"),
    "fed_rcl": FedRCL(clients=4, rounds=4, alpha=0.3, contrast=1.0, penalty=1.0, form="code"),
}
"""What each name stands for."""
OFF = {
    "sscl": {"sscl.layers": 0},
    "cards": {"cards.k": 0, "cards.case_switch": 0.0},
    "diffcse": {"diffcse.detection": 0},
    "adap_acse": {"adap_acse.margin": 0, "adap_acse.teacher": "somewhere/else"},
    "ifnd": {"ifnd.acceptance": 0},
    "core_tuning": {"core_tuning.focal_weight": False, "core_tuning.mixing": False},
    "schedule": {"schedule.temperatures": ""},
    "pnr": {"pnr.pseudo_negatives": False, "pnr.distillation": 0.0},
    "sparse_cse": {"sparse_cse.sparsity": 0.0},
    "iftcl": {"iftcl.twins": 0, "iftcl.queue": 0},
    "debcse": {"debcse.positives": False, "debcse.negatives": False},
    "fed_rcl": {"fed_rcl.rounds": 0, "fed_rcl.contrast": 0, "fed_rcl.penalty": 0},
}
TOGETHER = (SSCL(2), CARDS(k=4), IFND(0.8, clusters=5, cluster_steps=2))
"""Methods that change different things, all at once."""


@pytest.fixture
def margin(tiny_model):
    return AdapACSE(0.05, teacher=str(tiny_model("bert")))


def test_every_method_of_the_kit_has_its_authors_values():
    assert {name: methods.method(name)() for name in methods.names()} == AUTHORS


@pytest.mark.parametrize("name", AUTHORS)
def test_a_name_stands_for_its_settings(config, name):
    by_name = replace(config, objective=name)
    assert by_name.methods == (AUTHORS[name].fitted(config.encoder),)
    assert by_name.objective == InfoNCE()
    assert by_name == replace(config, methods=(AUTHORS[name],))
    assert by_name.settings["objective"] == f"info_nce+{name}"
    beside = replace(config, objective=f"focal_info_nce+{name}")
    assert beside == replace(config, objective=FocalInfoNCE(), methods=(AUTHORS[name],))
    for off in (OFF[name], {"objective": name} | OFF[name]):
        assert configured(config, off) == config


@pytest.mark.parametrize("name", AUTHORS)
def test_each_method_changes_what_is_learned(config, tmp_path, name, margin):
    # Two clusters and half a corpus a batch: three kept labels in it are enough for a pair.
    small = {"ifnd": IFND(clusters=2, cluster_steps=1), "adap_acse": margin, "cards": CARDS(k=8)}
    small["fed_rcl"] = FedRCL(clients=1, rounds=2)  # forty sentences, all of one article
    config = replace(config, batch_size=20)
    on = train(replace(config, methods=(small.get(name, AUTHORS[name]),)))
    assert on.losses != train(elsewhere(config, tmp_path, "plain")).losses
    assert np.isfinite(on.losses).all()


def test_a_report_sets_them_side_by_side(config, tmp_path):
    train(elsewhere(config, tmp_path, "plain"))
    for layers in (1, 2):
        train(elsewhere(config, tmp_path, f"sscl{layers}", methods=(SSCL(layers),)))
    focal = replace(config, objective="focal_info_nce")
    train(elsewhere(focal, tmp_path, "focal"))
    train(elsewhere(focal, tmp_path, "both", methods=(SSCL(),)))
    runs = load_runs(tmp_path)
    assert set(runs["settings"]) == {""}
    assert runs.set_index("name")["folder"].map(lambda path: path.name).to_dict() == {
        "InfoNCE": "plain",
        "Focal-InfoNCE": "focal",
        "InfoNCE + SSCL (layers=1)": "sscl1",
        "InfoNCE + SSCL": "sscl2",
        "Focal-InfoNCE + SSCL": "both",
    }
    assert runs["name"].tolist()[:2] == ["InfoNCE", "Focal-InfoNCE"]
    assert plots.style("Focal-InfoNCE + SSCL").colour != plots.style("Focal-InfoNCE").colour


def test_the_teacher_tf_idf_knows_sentences_by_their_words(made, sentences):
    terms = Terms(sentences)
    x = terms.encode(sentences[:60]).astype(np.float64)
    again = Terms(sentences).encode(sentences[:60])
    np.testing.assert_array_equal(x.astype(np.float32), again)
    counted = TfidfVectorizer(sublinear_tf=True, max_df=0.05).fit(sentences)
    whole = counted.transform(sentences).toarray()
    _, _, axes = np.linalg.svd(whole, full_matrices=False)
    reduced = whole[:60] @ axes[:32].T  # Gram matrices know no signs of axes
    np.testing.assert_allclose(x @ x.T, reduced @ reduced.T, atol=1e-4)
    assert not terms.encode(["zzyzx"]).any()
    with one_line_refusal("too few words for the teacher tf-idf: name an encoder"):
        Terms(["one word", "one word"])
    _, _, acting, batch = made(AdapACSE())
    batch(1)
    assert acting["adap_acse"].known.shape[0] == 8


def test_they_combine_with_each_other_and_the_modulation(config, margin):
    run = train(replace(config, objective="focal_info_nce", methods=(*TOGETHER, margin)))
    assert run.config.settings["objective"] == "focal_info_nce+adap_acse+cards+ifnd+sscl"
    assert np.isfinite(run.losses).all()
    assert run.record["weights"]["first"] != run.record["weights"]["last"]


def test_a_run_with_labels_goes_on_as_undisturbed(config, tmp_path):
    together = replace(config, methods=TOGETHER)
    undisturbed = train(elsewhere(together, tmp_path, "undisturbed"))

    train_until_interrupted(together, 4)
    again = train(together)
    assert again.losses == undisturbed.losses
    assert again.record["weights"] == undisturbed.record["weights"]


def test_micro_batches_give_the_same_losses(config, still_model, tmp_path, margin):
    margin = replace(margin, margin=0.1)
    still = replace(config, encoder=str(still_model), methods=(*TOGETHER, margin))
    whole = train(still)
    parts = train(elsewhere(still, tmp_path, "parts", micro_batch_size=3))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


def test_plain_batches_hold_nothing_more(made):
    _, corpus, _, batch = made()
    plain = batch(1)
    texts, token_ids = corpus.batch(np.arange(8))
    assert plain.sentences.texts == texts
    assert items(plain) == [(ids, None) for ids in token_ids]
    assert (plain.second, plain.places, plain.labels, plain.masked_pairs) == (None, {}, (), 0)
    vectors = torch.eye(8)
    assert compare(plain, 0, vectors, vectors).numbers() is None


def test_retrieved_negatives_are_near_and_others(made):
    encoder, corpus, _, batch = made(CARDS(k=4, case_switch=0.0))
    encoder.pooling = "mean"
    unit = corpus.embed(encoder).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -2)
    third = np.sort(cosines, axis=1)[:, -3]
    _, token_ids = corpus.batch(np.arange(len(corpus)))
    drawn = set()
    for step in range(1, 20):
        for row, (_, _, retrieved) in enumerate(items(batch(step))):
            found = token_ids.index(retrieved)
            assert found == row or cosines[row, found] >= third[row] - 1e-3
            drawn.add((row, found))
    assert len(drawn) > 8, "always the same neighbour"
    assert {(row, row) for row in range(8)} <= drawn, "the sentence itself is one of the k"
    assert items(made(CARDS(k=4, case_switch=0.0))[-1](7)) == items(batch(7))


def test_an_anchors_own_sentence_is_left_out_of_what_is_retrieved(made):
    for masked in (True, False):
        _, _, acting, batch = made(CARDS(k=2, case_switch=0.0), mask_duplicates=masked)
        plain = batch(1)
        rows = plain.sentences.rows.astype(int)
        assert (rows[8:] == rows[:8]).any() and (rows[8:] != rows[:8]).any()
        vectors = torch.eye(16)
        compared = compare(plain, 0, vectors[:8], vectors[:8], vectors[8:])
        extended = acting["cards"].loss(lambda extended: extended, compared)
        left_out = losses.repeats(extended.numbers(), 8, 16)
        expected = rows[:8, None] == rows[None, :]
        np.fill_diagonal(expected, False)
        np.testing.assert_array_equal(left_out.numpy(), expected)


def test_labels_come_with_time_and_mask_their_pairs(made):
    _, corpus, acting, batch = made(IFND(0.8, clusters=5, cluster_steps=2))
    method = acting["ifnd"]
    method.before_step(1)
    assert method.labels is None
    method.before_step(5)
    labels = method.labels
    assert (labels >= 0).sum() == int(0.8 * len(corpus)), "the last clustering of six steps"
    (ids,) = batch(5).labels
    for i in range(8):
        for j in range(8):
            same = i == j or (labels[i] >= 0 and labels[i] == labels[j])
            assert (ids[i] == ids[j]) == same


def test_case_is_switched_in_the_second_view_alone(made, tiny_model):
    encoder, _, _, batch = made(CARDS(k=0, case_switch=1.0), encoder=str(tiny_model("roberta")))
    switched = batch(1)
    for sentence, (own, second) in zip(switched.sentences.texts, items(switched), strict=True):
        (plain,) = encoder.tokenize([sentence], 16)
        assert own == plain
        assert second != plain
        swapped = encoder.tokenizer.decode(second, skip_special_tokens=True)
        assert swapped.strip()[0] == sentence[0].swapcase()


@pytest.fixture(scope="module")
def cased_model(tmp_path_factory, sentences):
    """A tiny BERT with a cased vocabulary of word pieces, of the packaged corpus."""
    tokenizer = make_tokenizer(sentences, cased=True)
    folder = tmp_path_factory.mktemp("cased") / "bert"
    return save_tiny_model(CONFIGS["bert"](len(tokenizer)), tokenizer, folder)


@pytest.mark.parametrize(("preset", "share", "variant"), [("base", 0.05, 2), ("large", 0.1, 1)])
def test_a_cased_vocabulary_has_its_case_switched_as_the_authors_do(
    preset, share, variant, made, cased_model
):
    config = TrainConfig(objective="cards", encoder=str(cased_model))
    assert config.name == "InfoNCE + CARDS"
    encoder, _, _, batch = made(CARDS(preset, k=4), encoder=str(cased_model), max_length=12)
    longer = 0
    for step in range(1, 9):
        found = batch(step)
        cut = [
            encoder.tokenizer.decode(ids, skip_special_tokens=True)
            for ids in found.sentences.token_ids[:8]
        ]
        texts = switched(cut, share, variant, seed=0, step=step)
        expected = [encoder.tokenizer(text)["input_ids"] for text in texts]
        assert [second for _, second, _ in items(found)] == expected
        assert max(map(len, found.sentences.token_ids[:8])) <= 12
        longer += sum(len(second) > 12 for second in expected)
        if variant == 1:
            assert sum(a != b for a, b in zip(cut, texts, strict=True)) > 4
    assert longer, "cut once more"


def test_without_a_case_it_is_said_to_be_retrieval_only(tiny_model):
    for encoder in ("minilm", str(tiny_model("bert"))):
        config = TrainConfig(objective="cards", encoder=encoder)
        assert config.name == "InfoNCE + CARDS (retrieval only)"
        assert config.settings["cards.case_switch"] == 0
    assert TrainConfig(objective="cards", encoder="no/such/model").name == "InfoNCE + CARDS"
    assert recorded(config.settings) == config


def test_pairs_left_out_are_logged_and_a_run_without_any_says_so(config, tmp_path, capsys):
    of_all = IFND(clusters=2, cluster_steps=2)
    run = train(elsewhere(config, tmp_path, "all", methods=(of_all,)))
    lines = [json.loads(x) for x in (run.folder / "metrics.jsonl").read_text().splitlines()]
    left_out = [line["ifnd.left_out"] for line in lines if "loss" in line]
    assert left_out[:2] == [0, 0]
    assert min(left_out[4:]) >= 2 * 4 * 3, "eight sentences in two clusters"
    assert run.record["remarks"] == []
    assert "ifnd left out" not in capsys.readouterr().err
    none = train(elsewhere(config, tmp_path, "none", methods=(replace(of_all, acceptance=0.02),)))
    (remark,) = none.record["remarks"]
    assert remark.startswith("ifnd left out 0.00 pairs a step, next to nothing: lower ifnd.clust")
    assert remark in capsys.readouterr().err


def test_counts_go_on_after_a_kill(config, tmp_path):
    config = replace(config, methods=(IFND(0.02, clusters=2, cluster_steps=2),))
    undisturbed = train(elsewhere(config, tmp_path, "undisturbed"))
    train_until_interrupted(config, 4)
    assert train(config).record["remarks"] == undisturbed.record["remarks"] != []


def test_lower_layers_go_through_the_same_head(made):
    encoder, corpus, _, _ = made()
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


def test_a_schedule_gives_each_step_its_temperature(made, config, tmp_path):
    _, _, acting, _ = made(Schedule("0.02 0.08 0.05"), steps=8)
    laid = [acting["schedule"].objective(step, FocalInfoNCE(m=0.1)) for step in range(1, 9)]
    assert {(each.m, type(each)) for each in laid} == {(0.1, FocalInfoNCE)}
    expected = np.interp(range(8), [0, 4, 8], [0.02, 0.08, 0.05])
    assert [each.temperature for each in laid] == pytest.approx(expected)
    at = replace(config, objective=InfoNCE(0.07))
    plain = train(elsewhere(at, tmp_path, "plain"))
    level = train(elsewhere(config, tmp_path, "level", methods=(Schedule("0.07"),)))
    assert level.losses == plain.losses
    assert level.record["weights"] == plain.record["weights"]
    assert level.config.name == "InfoNCE + temperature schedule (temperatures=0.07)"


def test_a_schedule_needs_a_temperature(config):
    @dataclass(frozen=True)
    class Bare:
        def logits(self, sim, positives):
            return 20 * sim

    with one_line_refusal(r"schedule\.temperatures beside Bare, which has no temperature"):
        replace(config, objective=Bare(), methods=(Schedule(),))


def in_numpy(u, columns, left_out, temperature=0.05):
    """InfoNCE of (N, D) and (M, D) in float64, the positives in the first N columns."""
    u, columns = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, columns))
    z = np.where(left_out, -np.inf, u @ columns.T / temperature)
    return (np.log(np.exp(z).sum(1)) - z.diagonal()).mean()


@pytest.mark.parametrize("name", ["sscl", "cards", "ifnd"])
def test_the_loss_is_the_formula_in_float64(name, made):
    method = {
        "sscl": SSCL(2),
        "cards": CARDS(k=2, case_switch=0.0),
        "ifnd": IFND(1.0, clusters=5, cluster_steps=2),
    }[name]
    _, _, acting, batch = made(method)
    acting[name].before_step(5)
    found = batch(5)
    rows = found.sentences.rows.astype(int)
    generator = torch.Generator().manual_seed(0)
    u, v, other = torch.randn(3, 8, 6, dtype=torch.float64, generator=generator)
    lower = torch.randn(8, 4, 6, dtype=torch.float64, generator=generator)
    more = {"sscl": (lower,), "cards": (other,)}.get(name, ())
    compared = compare(found, 2 if name == "sscl" else 0, u, v, *more)
    mine = loss_of(InfoNCE(), [*acting.values()], nullcontext(), compared).item()

    u, v, other, lower = (x.numpy() for x in (u, v, other, lower))
    nothing = np.zeros((8, 8), dtype=bool)
    if name == "sscl":
        further = lower.reshape(32, 6)
        extended = in_numpy(u, np.concatenate([v, further]), np.zeros((8, 40), dtype=bool))
        expected = (in_numpy(u, v, nothing) + extended) / 2
    elif name == "cards":
        own = rows[:8, None] == rows[None, :]
        np.fill_diagonal(own, False)
        assert own.any()
        expected = in_numpy(u, np.concatenate([v, other]), own)
    else:
        labels = acting[name].labels[rows]
        same = (labels[:, None] == labels) & ~np.eye(8, dtype=bool)
        assert same.any()
        expected = in_numpy(u, v, same)
    assert mine == pytest.approx(expected, rel=1e-12)


def test_the_loss_with_lower_layers_is_the_mean_of_two(made):
    encoder, _, acting, batch = made(SSCL(1))
    encoder.eval()
    assert acting["sscl"].layers == 1
    with torch.no_grad():
        u, v, lower = views(encoder, 1, nullcontext(), items(batch(1)))
        compared = compare(batch(1), 1, u, v, lower)
        found = loss_of(InfoNCE(), [*acting.values()], nullcontext(), compared)
        plain = losses.info_nce(losses.similarity_matrix(u, v))
        more = torch.cat([v, lower.flatten(0, 1)])
        extended = losses.info_nce(losses.similarity_matrix(u, more))
    assert found.item() == pytest.approx((plain + extended).item() / 2, rel=1e-5)
    assert extended > plain


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (CARDS(k=42), r"cards\.k must be at most \d+, the distinct sentences"),
        (IFND(clusters=41), r"ifnd\.clusters must be at most 40"),
        (CARDS(k=0, case_switch=0.1), "needs a cased vocabulary"),
        (AdapACSE(teacher="no/such/teacher"), "no/such/teacher"),
        (SSCL(3), r"sscl\.layers must be at most 2"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(config, method, message):
    with one_line_refusal(message):
        train(replace(config, methods=(method,)))
    assert not config.folder.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"core_tuning.mixing": True, "sscl.layers": 1},
            r"core_tuning\.mixing takes each row's own negatives, sscl\.layers adds some",
        ),
        (
            {"core_tuning.mixing": True, "iftcl.queue": 1},
            r"core_tuning\.mixing takes each row's own negatives, iftcl\.queue adds some",
        ),
        (
            {"core_tuning.mixing": True, "debcse.k": 4},
            r"core_tuning\.mixing to false, or debcse\.negatives to false",
        ),
        (
            {"diffcse.detection": 0.005, "micro_batch_size": 4},
            r"diffcse\.detection needs a batch in one pass",
        ),
        ({"cards.k": 1}, r"cards\.k must be at least 2, or 0 for no retrieval, got 1"),
        ({"cards.variant": 3}, r"cards\.variant must be 1 or 2, got 3"),
        ({"cards.readout": "max"}, r"unknown cards\.readout 'max': choose from cls, mean"),
        ({"cards.preset": "small"}, r"unknown cards\.preset 'small': choose from base, large"),
        ({"cards.case_switch": 2.0}, r"cards\.case_switch must lie between 0 and 1"),
        ({"core_tuning.way": "own"}, r"unknown core_tuning\.way 'own': choose from paper, code"),
        (
            {"core_tuning.way": "code", "core_tuning.mixing": False},
            r"core_tuning\.way code learns from mixtures alone",
        ),
        ({"ifnd.acceptance": 1.5}, r"ifnd\.acceptance must lie between 0 and 1"),
        ({"adap_acse.margin": 2.0}, r"adap_acse\.margin must be .* of at least 0 and below 1\.57"),
        ({"sscl.layers": -1}, r"sscl\.layers must be .* of at least 0"),
        ({"schedule.temperatures": "0.1 x"}, r"schedule\.temperatures must be numbers joined by"),
        ({"schedule.temperatures": "0.1 0"}, "temperature must be a finite number above 0, got 0"),
        ({"sscl.layer": 1}, r"unknown key 'sscl\.layer': did you mean layers\?"),
        ({"sscl.layers": "one"}, r"sscl\.layers must be a whole number, got 'one'"),
        ({"no_such.setting": 1}, "unknown method 'no_such': choose from adap_acse, cards"),
        ({"objective": "sscl+info_nce+focal_info_nce"}, "names 2 objectives: choose one"),
        ({"objective": "sscl+none_such"}, "unknown objective 'none_such'"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_one_line(config, settings, message):
    with one_line_refusal(message):
        configured(config, settings)
