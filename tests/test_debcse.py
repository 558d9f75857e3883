"""DebCSE after the abstract: what it draws, against probabilities by loops in float64."""

import json
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import elsewhere, one_line_refusal, train_until_interrupted
from test_processes import together

from fcse import losses
from fcse.config import configured
from fcse.encoder import SentenceEncoder
from fcse.methods.debcse import (
    BINS,
    EDITS,
    DebCSE,
    _cosines,
    drawn,
    inverse_propensities,
    overlaps,
    weights,
)
from fcse.methods.sscl import SSCL
from fcse.objectives import InfoNCE
from fcse.training import read_run, train
from fcse.training.batches import compare, items, loss_of

pytestmark = pytest.mark.usefixtures("own_cache")

KEY = DebCSE.key
FIVE = [
    "The old king ruled the north",
    "the old King, ruled; the north!",
    "The old queen ruled the south",
    "A ship left the harbour",
    "...",
]


@pytest.fixture
def debcse(tiny_model):
    """Settings -> DebCSE with a teacher that is quick, at thresholds that some candidates pass."""

    def make(**changes):
        usual = {"k": 8, "teacher": str(tiny_model("roberta")), "negative_to": 0.965}
        return DebCSE(**usual | {"positive_from": 0.976} | changes)

    return make


def test_a_cosine_below_zero_is_none():
    y = np.array([[[-1.0, 0.0], [2.0, 0.0], [1.0, 1.0], [0.0, 0.0]]])
    found = _cosines(np.array([[3.0, 0.0]]), y)
    np.testing.assert_allclose(found, [[0, 1, 0.5**0.5, 0]], rtol=1e-6)


def parts_by_hand(text):
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    return set(words) | {(a, b) for i, a in enumerate(words) for b in words[i + 1 : i + 2]}


def overlap_by_hand(x, y):
    x, y = parts_by_hand(x), parts_by_hand(y)
    return len([p for p in x if p in y]) / len([*x, *(p for p in y if p not in x)]) if x or y else 0


def test_overlap_is_the_jaccard_index_of_words_and_pairs(sentences):
    texts = [[*FIVE, *sentences[:20], x] for x in (*FIVE[:3], *sentences[:20:4])]
    expected = [[overlap_by_hand(x, y) for y in row] for *row, x in texts]
    found = overlaps(np.array(texts, object))
    np.testing.assert_allclose(found, expected, rtol=1e-15)
    assert found[0, 1] == 1, "case and punctuation are no words"
    # The, old, ruled, "the old" and "ruled the" of five words and five pairs each.
    assert found[0, 2] == pytest.approx(5 / 15)
    assert found[0, 4] == 0
    assert overlaps(np.array([["...", "..."]], object)) == 0


def propensities_by_hand(a, bins=BINS):
    counts = [1] * bins
    for x in a:
        counts[min(bins - 1, int(x * bins))] += 1
    below, above = [], []
    for i in range(bins):
        below.append(sum(counts[: i + 1]) / sum(counts))
        above.append(sum(counts[i:]) / sum(counts))
    return np.array([below, above])


def test_propensities_are_smoothed_shares_that_rise_and_fall_with_the_overlap():
    # Away from the edges of bins, where rounding may decide.
    a = np.random.default_rng(0).beta(2, 8, 500).round(3) + 0.0005
    a[:2] = 0.0005, 0.9995  # an empty bin at an end would be cut to the nearest one
    e = propensities_by_hand(a)
    np.testing.assert_allclose(inverse_propensities(a, cut=1.0), 1 / e, rtol=1e-12)
    assert (np.diff(e[0]) > 0).all() and (np.diff(e[1]) < 0).all()
    cut = inverse_propensities(a.reshape(50, 10), cut=0.9)
    for mine, whole in zip(cut, 1 / e, strict=True):
        most = np.quantile([whole[int(x * BINS)] for x in a], 0.9)
        np.testing.assert_allclose(mine, np.minimum(whole, most))
        assert (mine < whole).any()
    assert inverse_propensities(np.ones(3))[0, -1] == pytest.approx(1)


def chances_by_hand(a, b, e, settings):
    """Probabilities of both draws of one sentence, entry by entry."""
    found = []
    for kind in range(2):
        w = []
        for x, y in zip(a, b, strict=True):
            passes = y >= settings.positive_from if kind == 0 else y <= settings.negative_to
            target = y if kind == 0 else 1 - y
            w.append(target**settings.gamma / e[kind, min(BINS - 1, int(x * BINS))] * passes)
        found.append([x / sum(w) if sum(w) else 0.0 for x in w])
    return np.array(found)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5])
def test_probabilities_of_five_sentences(gamma):
    settings = DebCSE(positive_from=0.5, negative_to=0.6, gamma=gamma)
    a = overlaps(np.array([[*FIVE, x] for x in FIVE], object))
    b = np.random.default_rng(1).random((5, 5))
    b[4] = 0.55 if gamma else 0.4
    e = propensities_by_hand(a.ravel())
    w = weights(a, b, inverse_propensities(a, cut=1.0), settings)
    for i in range(5):
        expected = chances_by_hand(a[i], b[i], e, settings)
        sums = w[:, i].sum(1, keepdims=True)
        np.testing.assert_allclose(w[:, i] / np.where(sums, sums, 1), expected, rtol=1e-12)
        assert all(row.sum() in (0, pytest.approx(1)) for row in expected)
        # Drawn by the surface alone and weighed by 1 / e, what is left is the teacher's weight.
        plain = weights(a, b, np.ones((2, BINS)), settings)[:, i]
        bins = np.minimum((a[i] * BINS).astype(int), BINS - 1)
        np.testing.assert_allclose((e[:, bins] * w[:, i]).sum(1), plain.sum(1), rtol=1e-12)


def test_draws_are_as_frequent_as_their_weights():
    w = np.array([[0.0, 1.0, 3.0, 0.0, 4.0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1e-9]])
    count = 20_000
    uniform = np.random.default_rng(0).random((count, 3))
    found = drawn(np.broadcast_to(w, (count, 3, 5)), uniform)
    counts = np.bincount(found[:, 0], minlength=5)
    p = w[0] / 8
    # Five standard deviations of a binomial count.
    assert (abs(counts - count * p) <= 5 * np.sqrt(count * p * (1 - p))).all()
    assert (found[:, 1] == -1).all() and (found[:, 2] == 4).all()
    edge = np.array([0.0, 1 - 2**-53])
    assert drawn(w[[0, 0]], edge).tolist() == [1, 4]


def test_constant_propensities_leave_the_draw_unweighted():
    a, b = np.random.default_rng(0).random((2, 6, 9))
    settings = DebCSE(positive_from=0.3, negative_to=0.7)
    uniform = np.random.default_rng(1).random((2, 6))
    places = [drawn(weights(a, b, np.full((2, BINS), x), settings), uniform) for x in (1.0, 7.3)]
    np.testing.assert_array_equal(*places)
    # Among as good candidates few shared words favour positives, and many negatives.
    b = np.full_like(b, 0.5)
    near, far = weights(a, b, inverse_propensities(a, 1.0), settings)
    order = a[0].argsort()
    assert (np.diff(near[0][order]) <= 0).all() and (np.diff(far[0][order]) >= 0).all()
    assert near[0].min() < near[0].max() and far[0].min() < far[0].max()


def unit(x):
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_neighbours_and_cosines_are_the_teachers(made, debcse, tiny_model):
    method = debcse()
    _, corpus, acting, _ = made(method)
    texts, _ = corpus.batch(np.arange(len(corpus)))
    x = unit(SentenceEncoder.from_pretrained(method.teacher, "mean").encode(texts))
    cosines = x @ x.T
    near = acting[KEY].near
    np.testing.assert_allclose(
        near["cosine"], np.take_along_axis(cosines, near["row"], 1).clip(0, 1), atol=2e-3
    )
    np.fill_diagonal(cosines, -2)
    np.testing.assert_allclose(near["cosine"], -np.sort(-cosines)[:, :8], atol=2e-3)
    again = made(method)[2][KEY].near
    np.testing.assert_array_equal(near, again)


def test_what_is_drawn_passes_the_teacher_and_is_brought(made, debcse):
    method = debcse()
    _, corpus, acting, batch = made(method)
    teacher = SentenceEncoder.from_pretrained(method.teacher, "mean")
    texts, token_ids = corpus.batch(np.arange(len(corpus)))
    edited = neighbours = 0
    for step in range(1, 12):
        found = batch(step)
        positive, negative = acting[KEY].found
        own, brought = found.sentences.texts[:8], found.sentences.texts[8:]
        rows = found.sentences.rows.astype(int)
        cosines = (unit(teacher.encode(own)) * unit(teacher.encode(brought))).sum(1)
        for i in range(8):
            _, second, further = items(found)[i]
            assert (second != token_ids[i]) >= positive[i] or second == token_ids[i]
            if not positive[i]:
                assert second == token_ids[i]
            if negative[i]:
                assert cosines[i] <= method.negative_to + 2e-3
                assert brought[i] != own[i]
                if rows[8 + i] >= 0:
                    assert brought[i] == texts[rows[8 + i]] and further == token_ids[rows[8 + i]]
            else:
                assert brought[i] == own[i]
            if positive[i] and second in token_ids and second != token_ids[i]:
                j = token_ids.index(second)
                pair = unit(teacher.encode([texts[i], texts[j]]))
                assert pair[0] @ pair[1] >= method.positive_from - 2e-3
                neighbours += 1
            edited += bool(positive[i]) and second not in token_ids
    assert neighbours > 3 and edited > 3
    assert items(batch(3)) == items(made(method)[-1](3)) != items(batch(4))


def test_drawn_as_often_as_the_probabilities_say(made, debcse):
    """Positives that are neighbours, counted over many steps, against their chances."""
    _, corpus, acting, batch = made(debcse(negatives=False))
    method, expected, variance, count = acting[KEY], 0.0, 0.0, 0
    texts, token_ids = corpus.batch(np.arange(len(corpus)))
    teacher = SentenceEncoder.from_pretrained(method.settings.teacher, "mean")
    rows, steps = np.arange(8), range(1, 60)
    candidates = [method._candidates(rows, np.random.default_rng((5, 0, step))) for step in steps]
    own = unit(teacher.encode([x for them in candidates for x in them[:, 8:].ravel()]))
    for step, them, x in zip(steps, candidates, own.reshape(59, 8, EDITS + 1, -1), strict=True):
        found = batch(step)
        for i in rows:
            b = np.concatenate([method.near["cosine"][i], (x[i, :-1] @ x[i, -1]).clip(0, 1)])
            a = [overlap_by_hand(texts[i], y) for y in them[i, :-1]]
            chances = chances_by_hand(a, b, 1 / method.inverse, method.settings)[0]
            p = chances[:8].sum()
            expected, variance = expected + p, variance + p * (1 - p)
            if found.second is not None:
                count += found.second[i] in token_ids and found.second[i] != token_ids[i]
    assert variance > 20
    assert abs(count - expected) < 5 * np.sqrt(variance)


@pytest.mark.parametrize("masked", [True, False])
def test_only_what_was_drawn_joins_and_no_anchors_own(masked, made, debcse):
    _, _, acting, batch = made(debcse(negative_to=0.95, positives=False), mask_duplicates=masked)
    for step in range(1, 60):
        found, negative = batch(step), acting[KEY].found[1]
        # A step that draws a sentence of the batch for another one, and none for some.
        if np.isin(found.sentences.rows[8:][negative], np.arange(8)).any() and not negative.all():
            break
    assert found.second is None
    u, v, w = torch.randn(3, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    compared = compare(found, 0, u, v, w)
    extended = acting[KEY].loss(lambda extended: extended, compared)
    drawn_ = np.flatnonzero(negative)
    assert 0 < len(drawn_) < 8
    torch.testing.assert_close(extended.v, torch.cat([v, w[drawn_]]))
    rows = found.sentences.rows.astype(int)
    own = rows[:8, None] == rows[np.concatenate([np.arange(8), 8 + drawn_])]
    np.fill_diagonal(own, False)
    left_out = losses.repeats(extended.numbers(), 8, 8 + len(drawn_)).numpy()
    np.testing.assert_array_equal(left_out, own)

    cosines = unit(u.numpy()) @ unit(extended.v.numpy()).T
    z = np.exp(np.where(own, -np.inf, cosines / 0.05))
    expected = -np.log(z.diagonal() / z.sum(1)).mean()
    mine = loss_of(InfoNCE(), [acting[KEY]], nullcontext(), compared).item()
    assert mine == pytest.approx(expected, rel=1e-12)


def test_a_gradient_reaches_what_was_drawn_alone(made, debcse):
    _, _, acting, batch = made(debcse(negative_to=0.95))
    u, v, w = (
        x.requires_grad_() for x in torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(0))
    )
    loss_of(InfoNCE(), [acting[KEY]], nullcontext(), compare(batch(1), 0, u, v, w)).backward()
    negative = acting[KEY].found[1]
    np.testing.assert_array_equal(w.grad.any(1).numpy(), negative)
    assert negative.any() and not negative.all()


def test_where_nothing_passes_it_is_plain_training_and_says_so(
    config, tmp_path, debcse, capsys, made
):
    plain = train(elsewhere(config, tmp_path, "plain"))
    nothing = debcse(positives=False, negative_to=0.0)
    run = train(elsewhere(config, tmp_path, "nothing", methods=(nothing,)))
    assert run.losses == plain.losses
    assert run.record["weights"] == plain.record["weights"]
    (remark,) = run.record["remarks"]
    assert remark.startswith("debcse drew next to no negatives: lower debcse.positive_from")
    assert remark in capsys.readouterr().err
    off = DebCSE(positives=False, negatives=False)
    assert elsewhere(config, tmp_path, "plain", methods=(off,)) == plain.config
    # An edit of words that the vocabulary lacks is that sentence again, and may pass.
    _, _, acting, batch = made(debcse(positive_from=1.0, negative_to=0.0))
    seconds = []
    for step in range(1, 30):
        seconds.append(batch(step).second)
        assert (seconds[-1] is not None) == acting[KEY].found[0].any()
    assert None in seconds


@pytest.mark.parametrize("part", ["positives", "negatives"])
def test_either_part_alone_and_what_is_logged(part, config, tmp_path, debcse):
    plain = train(elsewhere(config, tmp_path, "plain"))
    alone = debcse(**{"positives": False, "negatives": False, part: True})
    run = train(elsewhere(config, tmp_path, part, methods=(alone,)))
    assert run.losses != plain.losses
    assert run.record["remarks"] == []
    lines = [json.loads(x) for x in (run.folder / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if "loss" in x]
    other = {"positives": "negatives", "negatives": "positives"}[part]
    assert {x[f"debcse.{other}"] for x in steps} == {0}
    assert {x[f"debcse.effective_{other}"] for x in steps} == {0}
    assert max(x[f"debcse.{part}"] for x in steps) > 0.3
    for x in steps:
        assert 0 <= x[f"debcse.{part}"] <= 1
        assert 1 <= x[f"debcse.effective_{part}"] <= 8 + EDITS or not x[f"debcse.{part}"]


def test_the_effective_size_is_that_of_the_weights(made, debcse):
    _, _, acting, batch = made(debcse(weighting=False, gamma=0.0, negatives=False))
    found = batch(1)
    counted = acting[KEY].counted(found)
    method = acting[KEY]
    candidates = method._candidates(np.arange(8), np.random.default_rng((5, 0, 1)))
    teacher = SentenceEncoder.from_pretrained(method.settings.teacher, "mean")
    passing = []
    for i, row in enumerate(candidates):
        x = unit(teacher.encode(row[8:].tolist()))
        edits = (x[:-1] @ x[-1] >= method.settings.positive_from).sum()
        passing.append((method.near["cosine"][i] >= method.settings.positive_from).sum() + edits)
    passing = np.array(passing)
    assert counted["positives"] == (passing > 0).mean()
    # Equal weights: as many as there are.
    assert counted["effective_positives"] == pytest.approx(passing[passing > 0].mean())


def test_weighting_changes_what_is_drawn(made, debcse):
    weighed, plain = (made(debcse(weighting=on)) for on in (True, False))
    assert (plain[2][KEY].inverse == 1).all()
    assert any(items(weighed[-1](step)) != items(plain[-1](step)) for step in range(1, 9))


def test_tf_idf_as_a_teacher(made, sentences, config, tmp_path):
    method = DebCSE(k=8, teacher="tf-idf", positive_from=0.9, negative_to=0.6)
    _, _, acting, _ = made(method)
    near = acting[KEY].near["cosine"]
    assert near.min() >= 0 and near.max() <= 1 and len(np.unique(near)) > 20
    assert method.files() == ()
    assert np.isfinite(train(replace(config, methods=(method,))).losses).all()


def test_a_run_that_is_killed_goes_on_as_undisturbed(config, tmp_path, debcse):
    both = replace(config, methods=(debcse(), SSCL(1)))
    undisturbed = train(elsewhere(both, tmp_path, "undisturbed"))
    train_until_interrupted(both, 4)
    again = train(both)
    assert again.losses == undisturbed.losses
    assert again.record["weights"] == undisturbed.record["weights"]


def test_the_remark_counts_steps_of_before_a_kill(config, debcse):
    few = replace(config, methods=(debcse(negative_to=0.0),))
    train_until_interrupted(few, 4)
    (remark,) = train(few).record["remarks"]
    assert remark.startswith("debcse drew next to no negatives: ")


def test_micro_batches_give_the_same_losses(config, still_model, tmp_path, debcse):
    # At a higher rate Adam makes much of the last bits of gradients that are nearly 0.
    still = replace(config, encoder=str(still_model), methods=(debcse(),), learning_rate=1e-4)
    whole = train(still)
    parts = train(elsewhere(still, tmp_path, "parts", micro_batch_size=3))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


def test_two_processes_are_one(config, still_model, tmp_path, debcse):
    still = replace(config, encoder=str(still_model), methods=(debcse(negative_to=0.95),))
    one = train(still)
    together(2, train, elsewhere(still, tmp_path, "two"))
    assert read_run(tmp_path / "two").losses == pytest.approx(one.losses, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"debcse.k": 0}, r"debcse\.k must be a finite number of at least 1, got 0"),
        ({"debcse.gamma": -1.0}, r"debcse\.gamma must be .* of at least 0, got -1"),
        ({"debcse.positive_from": 2.0}, r"debcse\.positive_from must lie between 0 and 1"),
        ({"debcse.negative_to": -0.1}, r"debcse\.negative_to must lie between 0 and 1"),
    ],
    ids=str,
)
def test_bad_settings_are_one_line(settings, message, config):
    with one_line_refusal(message):
        configured(config, settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 40}, "k must be from 1 to 39, .* 40 sentences of the corpus .* got 40"),
        ({"teacher": "no/such/teacher"}, "no/such/teacher"),
    ],
)
def test_what_cannot_be_is_one_line(changes, message, config, debcse):
    with one_line_refusal(message):
        train(replace(config, methods=(debcse(**changes),)))
    assert not config.folder.exists()
