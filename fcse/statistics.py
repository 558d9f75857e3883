"""Is a difference real: over the pairs of one task, and over the seeds of two objectives."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import scipy  # loads scipy.stats, which is slow, where it is first used

from fcse.data import SentencePairs
from fcse.errors import InputError

if TYPE_CHECKING:
    from fcse.encoder.sentence_encoder import SentenceEncoder


@dataclass(frozen=True)
class Comparison:
    """b minus a, in points of 100 x Spearman.

    difference: the observed difference or the mean over seeds. low, high: its interval at
    `confidence`. p: two-sided p-value of "no difference". n: pairs or seeds it rests on."""

    difference: float
    low: float
    high: float
    p: float
    n: int
    confidence: float = 0.95

    def __str__(self) -> str:
        interval = f"{100 * self.confidence:g} % interval {self.low:+.2f} to {self.high:+.2f}"
        return f"{self.difference:+.2f} ({interval}, p = {self.p:.3f}, n = {self.n})"


@dataclass(frozen=True)
class SeedSummary:
    """Scores of one objective over seeds: mean, sample standard deviation, interval of the mean."""

    mean: float
    sd: float
    low: float
    high: float
    n: int


def compare(
    a: "SentenceEncoder",
    b: "SentenceEncoder",
    task: SentencePairs,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Paired bootstrap over the pairs of a task, its parts taken together: b's Spearman minus a's.

    Each resample draws pairs with replacement and scores both encoders on the same draw, so what
    makes a pair easy or hard for both cancels. It speaks of these two encoders on other pairs, not
    of other seeds: for those see `compare_seeds`. Pairs that share a sentence, as all of Lee's do,
    are not independent: there the interval is too narrow. Percentile interval (Efron & Tibshirani
    1993, chapter 13); p is twice the share of resampled differences beyond 0. InputError: fewer
    than 100 resamples, or a confidence that is not between 0 and 1."""
    return compare_tasks(a, b, [task], resamples, confidence, seed)[0]


def compare_tasks(
    a: "SentenceEncoder",
    b: "SentenceEncoder",
    tasks: Sequence[SentencePairs],
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Comparison]:
    """`compare` for each task, and last for the mean over the tasks, each resampled by itself."""
    from fcse.evaluation import pair_similarities

    check_bootstrap(resamples, confidence)
    said = zip(pair_similarities(a, tasks), pair_similarities(b, tasks), tasks, strict=True)
    drawn, differences, results = [], [], []
    for i, (x, y, pairs) in enumerate(said):
        how = {"paired": True, "vectorized": True, "batch": 100, "n_resamples": resamples}
        how |= {"method": "percentile", "rng": np.random.default_rng(seed + i)}
        found = scipy.stats.bootstrap((x, y, pairs.gold), _difference, **how)
        drawn.append(found.bootstrap_distribution)
        differences.append(float(_difference(x, y, pairs.gold)))
        results.append(_comparison(differences[i], drawn[i], len(pairs), confidence))
    n = sum(map(len, tasks))
    mean = float(np.mean(differences))
    return [*results, _comparison(mean, np.mean(drawn, axis=0), n, confidence)]


def check_bootstrap(resamples: int, confidence: float) -> None:
    """Refuse with an `InputError` what is no number of resamples or no confidence."""
    if resamples < 100:
        raise InputError(f"resamples must be at least 100, got {resamples}")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}")


def _difference(a: np.ndarray, b: np.ndarray, gold: np.ndarray, axis: int = -1) -> np.ndarray:
    """100 x (Spearman of b - Spearman of a) along an axis: Pearson's of the ranks."""
    a, b, gold = (_standardised_ranks(x, axis) for x in (a, b, gold))
    return 100 * ((b - a) * gold).sum(axis)


def _standardised_ranks(x: np.ndarray, axis: int) -> np.ndarray:
    ranks = scipy.stats.rankdata(x, axis=axis)
    ranks -= ranks.mean(axis, keepdims=True)
    return ranks / np.linalg.norm(ranks, axis=axis, keepdims=True)


def _comparison(difference: float, drawn: np.ndarray, n: int, confidence: float) -> Comparison:
    drawn = drawn[np.isfinite(drawn)]  # of few pairs, a draw may hold one value only
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    beyond = min((drawn <= 0).sum(), (drawn >= 0).sum())
    # One is added to both counts: a bootstrap of B draws cannot show a p below 1 / (B + 1).
    p = min(1.0, 2 * (beyond + 1) / (len(drawn) + 1))
    return Comparison(difference, float(low), float(high), float(p), n, confidence)


def summarise_seeds(scores: Sequence[float], confidence: float = 0.95) -> SeedSummary:
    """Mean, sample standard deviation and Student's t interval of the mean over 2 or more seeds."""
    x = np.asarray(scores, dtype=float)
    if len(x) < 2:
        raise InputError(f"{len(x)} seed says nothing about the spread: run at least 2")
    low, high = map(float, scipy.stats.ttest_1samp(x, 0).confidence_interval(confidence))
    return SeedSummary(float(x.mean()), float(x.std(ddof=1)), low, high, len(x))


def compare_seeds(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Comparison:
    """Paired t test over seeds: a[i] and b[i] are two objectives' scores with the same seed.

    Equal seeds share head, batches and dropout, so their common luck cancels. Different lengths, or
    fewer than two seeds, are an `InputError`."""
    if len(a) != len(b) or len(a) < 2:
        raise InputError(f"a paired test needs 2 or more common seeds, got {len(a)} and {len(b)}")
    test = scipy.stats.ttest_rel(b, a)
    low, high = map(float, test.confidence_interval(confidence))
    difference = float(np.mean(np.subtract(b, a)))
    return Comparison(difference, low, high, float(test.pvalue), len(a), confidence)


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for how many there are, so that any false alarm has the stated chance.

    Holm 1979, "A Simple Sequentially Rejective Multiple Test Procedure": the smallest is
    multiplied by their number, the next by one less, and so on; none falls below one before it."""
    x = np.asarray(p, dtype=float)
    order = np.argsort(x, kind="stable")
    adjusted = np.empty_like(x)
    adjusted[order] = np.maximum.accumulate(x[order] * np.arange(len(x), 0, -1)).clip(max=1)
    return adjusted.tolist()


def seeds_needed(difference: float, sd: float, power: float = 0.8, confidence: float = 0.95) -> int:
    """Seeds for which a paired t test would see a true difference with probability `power`.

    Exact, by the noncentral t distribution (Cohen 1988, chapter 2); `sd` is that over seeds of the
    paired difference, in the same points. InputError: an sd that is not above 0, a difference
    of 0, or 10,000 seeds are too few."""
    effect = abs(difference) / sd if sd > 0 else 0
    for n in range(2, 10_001) if effect else ():
        if _power(effect, n, confidence) >= power:
            return n
    raise InputError(f"no 10,000 seeds show a difference of {difference} with an sd of {sd}")


def detectable(sd: float, n: int, power: float = 0.8, confidence: float = 0.95) -> float:
    """The smallest true difference that a paired t test over n seeds sees with that probability.

    `seeds_needed` the other way round: sd is that of the paired differences. InputError: n < 2."""
    if n < 2:
        raise InputError(f"{n} seed cannot show a difference: run at least 2")

    def short(effect: float) -> float:
        return _power(effect, n, confidence) - power

    return sd * float(scipy.optimize.brentq(short, 0, 100))


def _power(effect: float, n: int, confidence: float) -> float:
    """The probability that a paired t test over n seeds shows a difference of `effect` sd."""
    limit = scipy.stats.t.isf((1 - confidence) / 2, n - 1)
    return float(scipy.stats.nct.sf(limit, n - 1, effect * n**0.5))
