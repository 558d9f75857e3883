"""Intervals and p-values: against closed forms, against known truth, and against no difference."""

import numpy as np
import pytest
import scipy.stats

from fcse import published
from fcse.data import SentencePairs
from fcse.errors import InputError
from fcse.evaluation import aggregate_spearman, subset_scores
from fcse.statistics import compare_seeds, compare_similarities, summarise_seeds


@pytest.fixture
def gold():
    return np.random.default_rng(0).uniform(0, 5, 400)


def noisy(gold, noise, seed):
    return gold + np.random.default_rng(seed).normal(scale=noise, size=len(gold))


def test_a_clear_difference_is_seen(gold):
    result = compare_similarities(noisy(gold, 3, 1), noisy(gold, 1, 2), gold, resamples=500)
    assert 0 < result.low < result.difference < result.high
    assert result.p == pytest.approx(2 / 501)
    swapped = compare_similarities(noisy(gold, 1, 2), noisy(gold, 3, 1), gold, resamples=500)
    assert swapped.difference == pytest.approx(-result.difference)
    assert swapped.high < 0


def test_no_difference_is_not_claimed(gold):
    found = [
        compare_similarities(noisy(gold, 2, 2 * i), noisy(gold, 2, 2 * i + 1), gold, 200).p < 0.05
        for i in range(20)
    ]
    assert sum(found) <= 4  # 1 expected; more than 4 of 20 has a chance of 0.3 %


def test_an_encoder_against_itself(gold):
    same = compare_similarities(gold, gold, gold, resamples=100)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)


def test_the_interval_names_its_numbers(gold):
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
    assert base["focal_infonce_z"] == pytest.approx((77.32 - 75.107) / 0.844)
    assert table["min"].lt(table["mean"]).all()
    assert table["mean"].lt(table["max"]).all()
