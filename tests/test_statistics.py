"""Intervals and p-values: against closed forms, against known truth, and against no difference."""

import numpy as np
import pytest
import scipy.stats

from fcse import evaluation
from fcse.data import SentencePairs
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError
from fcse.evaluation import aggregate_spearman, subset_scores
from fcse.statistics import (
    compare,
    compare_seeds,
    compare_tasks,
    seeds_needed,
    summarise_seeds,
)
from fcse.study import published


@pytest.fixture
def gold():
    return np.random.default_rng(0).uniform(0, 5, 400)


@pytest.fixture
def compare_similarities(monkeypatch):
    """`compare` of encoders that are what they say of the pairs: (n,) floats each."""
    monkeypatch.setattr(evaluation, "pair_similarities", lambda encoder, tasks: [encoder])

    def compared(a, b, gold, *others, **options):
        texts = [""] * len(gold)
        return compare(a, b, SentencePairs("T", texts, texts, gold, 5.0, texts), *others, **options)

    return compared


def noisy(gold, noise, seed):
    return gold + np.random.default_rng(seed).normal(scale=noise, size=len(gold))


def test_a_clear_difference_is_seen(gold, compare_similarities):
    result = compare_similarities(noisy(gold, 3, 1), noisy(gold, 1, 2), gold, resamples=500)
    assert 0 < result.low < result.difference < result.high
    assert result.p == pytest.approx(2 / 501)
    swapped = compare_similarities(noisy(gold, 1, 2), noisy(gold, 3, 1), gold, resamples=500)
    assert swapped.difference == pytest.approx(-result.difference)
    assert swapped.high < 0


def test_no_difference_is_not_claimed(gold, compare_similarities):
    found = [
        compare_similarities(noisy(gold, 2, 2 * i), noisy(gold, 2, 2 * i + 1), gold, 200).p < 0.05
        for i in range(20)
    ]
    assert sum(found) <= 4  # 1 expected; more than 4 of 20 has a chance of 0.3 %


def test_an_encoder_against_itself(gold, compare_similarities):
    same = compare_similarities(gold, gold, gold, resamples=100)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_bootstrap_equals_a_plain_loop(gold, compare_similarities):
    # Judgements of a few levels: ties are what a short cut for ranks would get wrong.
    gold = np.round(gold)
    a, b = noisy(gold, 3, 1).round(1), noisy(gold, 2, 2).round(1)
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(1000):
        rows = rng.integers(0, len(gold), len(gold))
        scores = [scipy.stats.spearmanr(x[rows], gold[rows]).statistic for x in (a, b)]
        drawn.append(100 * (scores[1] - scores[0]))
    result = compare_similarities(a, b, gold, resamples=1000, confidence=0.9)
    whole = [scipy.stats.spearmanr(x, gold).statistic for x in (a, b)]
    assert result.difference == pytest.approx(100 * (whole[1] - whole[0]))
    # Two independent bootstraps of 1,000 draws: their ends agree within a tenth of the width.
    low, high = np.quantile(drawn, [0.05, 0.95])
    assert result.low == pytest.approx(low, abs=0.1 * (high - low))
    assert result.high == pytest.approx(high, abs=0.1 * (high - low))


def test_intervals_hold_the_truth_as_often_as_they_say(compare_similarities):
    # Pairs drawn from a population whose difference is known from a large sample.
    def population(n, seed):
        rng = np.random.default_rng(seed)
        gold = rng.normal(size=n)
        return gold + rng.normal(size=n), gold + 0.8 * rng.normal(size=n), gold

    a, b, gold = population(200_000, 0)
    of_a, of_b = (scipy.stats.spearmanr(x, gold).statistic for x in (a, b))
    truth = 100 * (of_b - of_a)
    results = [compare_similarities(*population(150, s), 300, 0.9) for s in range(1, 101)]
    held = sum(r.low <= truth <= r.high for r in results)
    assert 80 <= held <= 98  # 90 expected, three standard deviations of 3 either way


def test_encoders_are_compared_on_the_pairs_of_each_task(tiny_model, minilm, sentences):
    other = SentenceEncoder.from_pretrained(tiny_model("bert"))
    rng = np.random.default_rng(0)
    tasks = [
        SentencePairs(
            name, sentences[i : i + n], sentences[50 : 50 + n], rng.normal(size=n), 5.0, [name] * n
        )
        for name, i, n in (("A", 0, 30), ("B", 100, 20))
    ]
    first, second, mean = compare_tasks(minilm, other, tasks, resamples=200)
    for result, pairs in ((first, tasks[0]), (second, tasks[1])):
        plain = [
            100
            * scipy.stats.spearmanr(
                (e.encode(pairs.left, normalize=True) * e.encode(pairs.right, normalize=True)).sum(
                    1
                ),
                pairs.gold,
            ).statistic
            for e in (minilm, other)
        ]
        assert result.difference == pytest.approx(plain[1] - plain[0], abs=1e-3)
        assert result.n == len(pairs)
    assert mean.difference == pytest.approx((first.difference + second.difference) / 2)
    assert mean.n == 50
    # Resampled by itself, each task adds its own share of noise to the mean.
    widths = [r.high - r.low for r in (first, second)]
    assert mean.high - mean.low == pytest.approx(np.hypot(*widths) / 2, rel=0.25)
    assert compare(minilm, other, tasks[0], resamples=200) == first


@pytest.mark.parametrize(("difference", "sd"), [(1, 1), (-0.5, 1), (2, 1.5)])
def test_seeds_needed_by_simulation(difference, sd):
    n = seeds_needed(difference, sd)
    rng = np.random.default_rng(0)

    def power(n):
        drawn = rng.normal(difference, sd, (20_000, n))
        return (scipy.stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean()

    assert power(n) > 0.79
    assert power(n - 1) < 0.81


@pytest.mark.parametrize(("difference", "sd"), [(0, 1), (1, 0), (1e-4, 1)])
def test_seeds_without_number_are_refused(difference, sd):
    with pytest.raises(InputError, match="seeds"):
        seeds_needed(difference, sd)


@pytest.mark.parametrize(("resamples", "confidence"), [(99, 0.95), (100, 0), (100, 1), (0, 0.5)])
def test_bad_bootstraps_are_refused(gold, resamples, confidence, compare_similarities):
    with pytest.raises(InputError, match=r"resamples|confidence"):
        compare_similarities(gold, gold, gold, resamples, confidence)


def test_the_interval_names_its_numbers(gold, compare_similarities):
    text = str(compare_similarities(noisy(gold, 3, 1), noisy(gold, 1, 2), gold, resamples=200))
    assert "95 % interval" in text
    assert "n = 400" in text


def test_seed_summary_equals_the_formulas():
    x = np.array([75.1, 74.2, 76.0, 75.5])
    summary = summarise_seeds(x)
    half = scipy.stats.t.ppf(0.975, 3) * x.std(ddof=1) / 2
    assert (summary.mean, summary.sd) == pytest.approx((x.mean(), x.std(ddof=1)))
    assert (summary.low, summary.high) == pytest.approx((x.mean() - half, x.mean() + half))


def test_seeds_are_compared_in_pairs():
    a = np.array([70.0, 75.0, 80.0, 72.0])
    b = a + np.array([0.5, 0.6, 0.4, 0.5])
    paired = compare_seeds(a, b)
    assert paired.low > 0.3
    assert paired.p < 0.01
    assert scipy.stats.ttest_ind(a, b).pvalue > 0.5  # unpaired, the spread of seeds hides it


@pytest.mark.parametrize(("a", "b"), [([1.0], [2.0]), ([1.0, 2.0], [1.0])])
def test_too_few_seeds_are_refused(a, b):
    with pytest.raises(InputError):
        compare_seeds(a, b)


def test_aggregates_by_hand():
    rng = np.random.default_rng(4)
    similarity, gold = rng.normal(size=30), rng.normal(size=30)
    subsets = ["a"] * 20 + ["b"] * 10
    pairs = SentencePairs("T", [""] * 30, [""] * 30, gold, 5.0, subsets)
    a, b = (
        100 * scipy.stats.spearmanr(similarity[rows], gold[rows]).statistic
        for rows in (slice(20), slice(20, 30))
    )
    whole = 100 * scipy.stats.spearmanr(similarity, gold).statistic
    assert aggregate_spearman(similarity, pairs, "all") == pytest.approx(whole)
    assert aggregate_spearman(similarity, pairs, "mean") == pytest.approx((a + b) / 2)
    assert aggregate_spearman(similarity, pairs, "wmean") == pytest.approx((2 * a + b) / 3)
    parts = subset_scores(similarity, pairs)
    assert parts["a"] == {"spearman": pytest.approx(a), "pairs": 20}
    assert parts["b"] == {"spearman": pytest.approx(b), "pairs": 10}


def test_published_gains_against_seed_noise():
    table = published.gains().set_index("backbone")
    base = table.loc["bert-base-uncased"]
    assert base["gain"] == pytest.approx(77.32 - 76.25)
    assert base["gain_z"] == pytest.approx((77.32 - 76.25) / 0.844)
    assert base["focal_infonce_z"] == pytest.approx((77.32 - 75.107) / 0.844)
    assert table["min"].lt(table["mean"]).all()
    assert table["mean"].lt(table["max"]).all()
