"""Scores against their formulas in NumPy, against scipy, and against the field's own code."""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import scipy.stats
import torch
from transformers import AutoModel, AutoTokenizer

from fcse.data import MINILM, STS_SUBSETS, SentencePairs, load_lee, load_sts
from fcse.encoder import SentenceEncoder
from fcse.encoder.pooling import Pooling
from fcse.evaluation import (
    Aggregate,
    aggregate_spearman,
    alignment,
    embed_pairs,
    judge,
    pair_similarities,
    spearman,
    uniformity,
)


def ranks(x):
    """Ranks from 1; equal values share the mean of the ranks they take up."""
    x = np.asarray(x, dtype=np.float64)
    return np.array([(x < a).sum() + ((x == a).sum() + 1) / 2 for a in x])


def points(n, dimension, seed, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=(n, dimension)).astype(dtype)


def unit(x):
    x = np.asarray(x, dtype=np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("levels", [2, 6, 1000])
def test_spearman_averages_ties(levels):
    rng = np.random.default_rng(levels)
    x, y = rng.integers(0, levels, (2, 200))
    by_hand = np.corrcoef(ranks(x), ranks(y))[0, 1]
    assert spearman(x, y) == pytest.approx(by_hand, abs=1e-12)
    assert spearman(x, y) == pytest.approx(scipy.stats.spearmanr(x, y)[0], abs=1e-12)


def test_spearman_sees_order_alone():
    x = np.random.default_rng(0).normal(size=50)
    assert spearman(x, np.exp(3 * x)) == pytest.approx(1)
    assert spearman(x.tolist(), (-(x**3)).tolist()) == pytest.approx(-1)
    assert type(spearman(x, x)) is float


@pytest.mark.filterwarnings("ignore::scipy.stats.ConstantInputWarning")
def test_spearman_of_a_constant_is_not_a_number():
    assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))


@pytest.mark.parametrize("as_given", [np.asarray, torch.from_numpy])
def test_alignment_is_the_formula(as_given):
    u, v = points(40, 8, 1), points(40, 8, 2)
    by_hand = np.mean([((a - b) ** 2).sum() for a, b in zip(unit(u), unit(v), strict=True)])
    assert alignment(as_given(u), as_given(v)) == pytest.approx(by_hand, rel=1e-12)
    assert alignment(as_given(3 * u), as_given(0.1 * v)) == pytest.approx(by_hand, rel=1e-12)
    assert alignment(as_given(u), as_given(u)) == pytest.approx(0, abs=1e-12)
    assert alignment(as_given(u), as_given(-u)) == pytest.approx(4)
    single = alignment(as_given(u.astype(np.float32)), as_given(v.astype(np.float32)))
    assert single == pytest.approx(by_hand, rel=1e-6)


def naive_uniformity(x, t):
    x = unit(x)
    squared = ((x[:, None] - x[None]) ** 2).sum(-1)
    apart = ~np.eye(len(x), dtype=bool)
    return np.log(np.exp(-t * squared[apart]).mean())


@pytest.mark.parametrize("t", [0.5, 2, 5])
@pytest.mark.parametrize("n", [2, 3, 100])
def test_uniformity_is_the_formula(n, t):
    x = points(n, 6, seed=n)
    assert uniformity(x, t) == pytest.approx(naive_uniformity(x, t), rel=1e-10)
    assert uniformity(torch.from_numpy(7 * x), t) == pytest.approx(
        naive_uniformity(x, t), rel=1e-10
    )
    # Of few points, in float32, the diagonal's rounding is left in the sum.
    single = uniformity(x.astype(np.float32), t)
    assert single == pytest.approx(naive_uniformity(x, t), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("n", [1023, 1024, 1025, 2100])
def test_uniformity_over_several_blocks(n):
    x = points(n, 3, seed=3)
    scattered = unit(x)
    squared = 2 - 2 * scattered @ scattered.T
    np.fill_diagonal(squared, np.inf)
    by_hand = np.log(np.exp(-2 * squared).sum() / (n * (n - 1)))
    assert uniformity(x) == pytest.approx(by_hand, rel=1e-9)


def test_uniformity_of_a_single_point_is_zero():
    assert uniformity(np.ones((50, 4))) == pytest.approx(0, abs=1e-6)
    antipodes = np.array([[1.0, 0], [-1, 0]])
    assert uniformity(antipodes) == pytest.approx(-8)


def test_pairs_are_embedded_side_by_side(minilm, sentences):
    first = SentencePairs("A", sentences[:3], sentences[2:5], np.arange(3.0), 5.0, ["A"] * 3)
    second = SentencePairs("B", sentences[4:6], sentences[:2], np.arange(2.0), 5.0, ["B"] * 2)
    x = minilm.encode(sentences[:6], normalize=True)
    for (u, v), left, right in zip(
        embed_pairs(minilm, [first, second]), ([0, 1, 2], [4, 5]), ([2, 3, 4], [0, 1]), strict=True
    ):
        np.testing.assert_allclose(u, x[left], atol=1e-6)
        np.testing.assert_allclose(v, x[right], atol=1e-6)
    # The same sentence has the same vector wherever it stands.
    (u, v), _ = embed_pairs(minilm, [first, second])
    np.testing.assert_array_equal(u[2], v[0])


def test_judge_takes_the_pairs_and_sentences_of_the_convention(minilm, sentences):
    left, right = sentences[:12], [*sentences[12:22], sentences[0], sentences[1]]
    gold = np.array([0, 1, 2, 3, 4, 4.0001, 5, 2, 1, 0, 4.5, 4.2])
    pairs = SentencePairs("T", left, right, gold, 5.0, ["T"] * 12)
    result = judge(minilm, pairs)
    u, v = minilm.encode(left, normalize=True), minilm.encode(right, normalize=True)
    above_four = [5, 6, 10, 11]
    distinct = minilm.encode(sentences[:22], normalize=True)
    cosine = (u * v).sum(axis=1)
    np.testing.assert_allclose(pair_similarities(minilm, [pairs])[0], cosine, atol=1e-6)
    assert result["spearman"] == pytest.approx(100 * np.corrcoef(ranks(cosine), ranks(gold))[0, 1])
    by_hand = np.mean(((u[above_four] - v[above_four]) ** 2).sum(axis=1))
    assert result["alignment"] == pytest.approx(by_hand, rel=1e-4)
    assert result["uniformity"] == pytest.approx(naive_uniformity(distinct, 2), rel=1e-4)


def test_the_scale_of_the_judgements_does_not_matter(minilm, sentences):
    gold = np.array([0.1, 0.5, 0.85, 0.95])
    arguments = (sentences[:4], sentences[4:8])
    small = judge(minilm, SentencePairs("T", *arguments, gold, 1.0, ["T"] * 4))
    large = judge(minilm, SentencePairs("T", *arguments, 5 * gold, 5.0, ["T"] * 4))
    assert small == large


def test_the_packaged_encoder_on_lee(minilm):
    lee = load_lee()
    score = judge(minilm, lee)["spearman"]
    assert score == pytest.approx(47.44, abs=0.05)
    documents = list(dict.fromkeys([*lee.left, *lee.right]))
    x = dict(zip(documents, unit(minilm.encode(documents)), strict=True))
    cosine = [x[a] @ x[b] for a, b in zip(lee.left, lee.right, strict=True)]
    by_hand = 100 * np.corrcoef(ranks(cosine), ranks(lee.gold))[0, 1]
    # Ties among cosines may break the other way in float32.
    assert score == pytest.approx(by_hand, abs=1e-2)


def test_scores_are_those_of_the_embedding_without_the_head(tiny_model):
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"))
    before = judge(encoder, load_lee())
    torch.nn.init.zeros_(encoder.head[0].weight)
    assert judge(encoder, load_lee()) == before


def test_scores_agree_with_the_senteval_code(minilm, senteval):
    # What the evaluation code of the SimCSE and Focal-InfoNCE repositories gives for these weights;
    # tests/test_cli.py does the same with STS16 and STSBenchmark.
    pairs = load_sts("SICKRelatedness", folder=senteval)
    assert judge(minilm, pairs)["spearman"] == pytest.approx(70.4684, abs=0.02)


def test_the_packaged_encoder_on_the_dev_split(minilm, senteval):
    result = judge(minilm, load_sts("STSBenchmark", "dev", senteval))
    assert result["spearman"] == pytest.approx(79.7315, abs=0.02)
    assert round(result["alignment"], 2) == 0.10
    assert round(result["uniformity"], 2) == -1.74


@torch.no_grad()
def plain_cosines(pairs):
    """Pooling -> cosine of every pair: batches in file order, padded, nothing reused."""
    folder = MINILM.locate().parent
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )

    def embed(texts):
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        hidden = model(**batch, output_hidden_states=True).hidden_states
        mask = batch["attention_mask"][:, :, None]

        def mean(tokens):
            return (tokens * mask).sum(dim=1) / mask.sum(dim=1)

        return {
            "cls": hidden[-1][:, 0],
            "mean": mean(hidden[-1]),
            "mean_first_last": mean((hidden[1] + hidden[-1]) / 2),
            "mean_top2": mean((hidden[-2] + hidden[-1]) / 2),
        }

    cosines = {pooling: [] for pooling in get_args(Pooling)}
    for start in range(0, len(pairs), 16):
        left, right = (embed(side[start : start + 16]) for side in (pairs.left, pairs.right))
        for pooling, rows in cosines.items():
            u, v = left[pooling].double().numpy(), right[pooling].double().numpy()
            norms = np.sqrt((u**2).sum(axis=1) * (v**2).sum(axis=1))
            rows.extend((u * v).sum(axis=1) / norms)
    return cosines


def test_every_pooling_and_aggregate_equals_a_plain_computation(senteval):
    whole = load_sts("STS16", folder=senteval)
    some = {name: getattr(whole, name)[::5] for name in ("left", "right", "gold", "subsets")}
    pairs = replace(whole, **some)
    assert set(pairs.subsets) == set(STS_SUBSETS["STS16"])
    over_all = []
    for pooling, cosines in plain_cosines(pairs).items():
        parts = {name: ([], []) for name in pairs.subsets}
        for name, cosine, gold in zip(pairs.subsets, cosines, pairs.gold, strict=True):
            parts[name][0].append(cosine)
            parts[name][1].append(gold)
        by_part = [100 * scipy.stats.spearmanr(*part).statistic for part in parts.values()]
        counts = [len(gold) for _, gold in parts.values()]
        expected = {
            "all": 100 * scipy.stats.spearmanr(cosines, pairs.gold).statistic,
            "mean": sum(by_part) / len(by_part),
            "wmean": sum(r * n for r, n in zip(by_part, counts, strict=True)) / sum(counts),
        }
        encoder = SentenceEncoder.from_pretrained("minilm", pooling)
        (similarity,) = pair_similarities(encoder, [pairs])
        for aggregate in get_args(Aggregate):
            score = aggregate_spearman(similarity, pairs, aggregate)
            assert score == pytest.approx(expected[aggregate], abs=0.01)
        # What is compared differs by more than is allowed for: none passes in place of another.
        assert np.diff(sorted(expected.values())).min() > 0.02
        over_all.append(expected["all"])
    assert np.diff(sorted(over_all)).min() > 0.02
