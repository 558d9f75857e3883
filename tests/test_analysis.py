"""Numbers behind the pictures, against brute force."""

import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from formulas import kinds, logit_and_slope, loss_and_weights, turned

from fcse import analysis
from fcse.losses import Columns
from fcse.methods.adap_acse import turn
from fcse.methods.core_tuning import FocalWeight
from fcse.objectives import FocalInfoNCE, HardnessInfoNCE, InfoNCE, name


@pytest.fixture
def sim():
    matrix = torch.rand(20, 20, generator=torch.Generator().manual_seed(3)) * 1.6 - 0.7
    return matrix.fill_diagonal_(0.9)


def pulls_by_hand(sim, objective):
    return len(sim) * loss_and_weights(sim.double().numpy(), objective)[1]


@pytest.mark.parametrize("objective", kinds(0.1), ids=name)
def test_negative_pulls_are_the_gradient_of_each_row(sim, objective):
    s, pull = analysis.negative_pulls(sim, objective)
    negative = ~np.eye(20, dtype=bool)
    by_hand = pulls_by_hand(sim, objective)[negative]
    np.testing.assert_allclose(pull, by_hand, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(s, sim[negative].numpy())


def test_deciles_share_the_whole_pull(sim):
    objectives = kinds(0.5)
    table = analysis.pull_by_decile(sim, objectives)
    assert list(table["name"].unique()) == [name(x) for x in objectives]
    for objective in objectives:
        rows = table[table["name"] == name(objective)]
        negative = ~np.eye(20, dtype=bool)
        pull = np.abs(pulls_by_hand(sim, objective)[negative])
        ranks = sim.numpy()[negative].argsort().argsort()
        expected = [pull[ranks // 38 == d].sum() / pull.sum() for d in range(10)]
        np.testing.assert_allclose(rows["share"], expected, rtol=1e-5)
        assert rows["similarity"].is_monotonic_increasing
        hardest = analysis.hardest_share(sim, objective)
        assert hardest == pytest.approx(expected[-1], rel=1e-5)


@pytest.mark.parametrize("objective", kinds(0.1, 0.4), ids=name)
def test_curves_are_the_formulas(objective):
    table = analysis.curves([objective, "info_nce"])
    assert list(table["name"].unique()) == [name(objective), "InfoNCE"]
    table = table[table["name"] == name(objective)]
    s = table["similarity"].to_numpy()
    np.testing.assert_allclose(s, np.linspace(-1, 1, 201), atol=1e-12)
    for prefix, positive in (("", False), ("positive_", True)):
        logit, slope = np.array([logit_and_slope(objective, x, positive) for x in s]).T
        np.testing.assert_allclose(table[f"{prefix}logit"], logit, atol=1e-12)
        np.testing.assert_allclose(table[f"{prefix}slope"], slope, atol=1e-12)


def test_the_curve_of_a_margin_is_that_of_turned_similarities():
    objective = FocalInfoNCE(0.1, 0.4)
    # The numbers of a batch's sentences have no part in it.
    table = analysis.curve(objective, Columns(torch.zeros(8), (turn(0.3),)), points=101)
    s = table["similarity"].to_numpy()
    seen, steepness = np.vectorize(turned)(s, 0.3, 0.0)
    logit, slope = np.array([logit_and_slope(objective, x, False) for x in seen]).T
    np.testing.assert_allclose(table["logit"], logit, atol=1e-12)
    np.testing.assert_allclose(table["slope"], slope * steepness, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(table["positive_logit"], s * s / 0.1, atol=1e-12)


@dataclass(frozen=True)
class Cubic:
    """The slope of its logits turns at -0.6 and at 0.2, upwards at the second alone."""

    def logits(self, sim, positives):
        return sim**3 / 3 + 0.2 * sim**2 - 0.12 * sim


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        *((FocalInfoNCE(0.05, m), -m / 2) for m in (0.3, 0.0, -0.7, 1.9)),
        *((FocalInfoNCE(0.05, m, "negative"), -m / 2) for m in (0.3, 0.11)),
        *((FocalInfoNCE(0.05, m, stop_gradient=True), -m) for m in (0.3, 0.0, -0.7)),
        (Cubic(), 0.2),
        ("focal_info_nce", -0.15),
        (FocalWeight(FocalInfoNCE()), -0.15),
        *((x, None) for x in (InfoNCE(), HardnessInfoNCE(), FocalInfoNCE(modulate="positive"))),
        *((FocalInfoNCE(m=m), None) for m in (2.5, -2.5)),
    ],
    ids=str,
)
def test_the_resting_point_is_where_the_slope_turns_upwards(objective, expected):
    found = analysis.resting_point(objective)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-6))


def test_a_margin_moves_the_resting_point_to_what_is_turned_there():
    found = analysis.resting_point("focal_info_nce", Columns(turns=(turn(0.2),)))
    assert turned(found, 0.2, 0.0)[0] == pytest.approx(-0.15, abs=1e-6)


@pytest.mark.parametrize("anchor", [0, 7])
def test_candidates_carry_the_probabilities_of_their_row(sim, anchor):
    names = [f"sentence {i}" for i in range(20)]
    ids = torch.arange(20) % 15
    objective = FocalInfoNCE(0.1, 0.4)
    table = analysis.candidates(sim, names, anchor, objective, Columns(ids))
    assert table["similarity"].is_monotonic_decreasing
    assert list(table["sentence"]) == [names[j] for j in table["candidate"]]
    assert sorted(table["candidate"]) == list(range(20))
    row = sim[anchor].double().numpy()
    for column, which, kept in (
        ("plain", InfoNCE(0.1), np.full(20, True)),
        ("chosen", objective, (ids != ids[anchor]).numpy() | (np.arange(20) == anchor)),
    ):
        z = np.array([logit_and_slope(which, x, j == anchor)[0] for j, x in enumerate(row)])
        p = np.exp(z) * kept / np.exp(z)[kept].sum()
        np.testing.assert_allclose(table[column], p[table["candidate"]], rtol=1e-4)


def test_below_resting_point_counts_what_is_drawn_closer(sim):
    table = analysis.below_resting_point(sim, [-1.0, 0.0, 1.2], temperature=0.1)
    negatives = sim[~torch.eye(20, dtype=torch.bool)]
    for _, row in table.iterrows():
        assert row["below"] == pytest.approx((negatives < -row["m"] / 2).float().mean().item())
    assert table["pull_towards"].is_monotonic_decreasing
    assert table["pull_towards"].iloc[0] > 0 > table["resting_point"].iloc[-1]


def test_purity_by_brute_force():
    x = np.random.default_rng(0).normal(size=(30, 5))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    labels = ["a", "b", "c"] * 10
    hits = 0
    for i in range(30):
        nearest = sorted((j for j in range(30) if j != i), key=lambda j: -(x[i] @ x[j]))[:4]
        hits += sum(labels[j] == labels[i] for j in nearest)
    assert analysis.neighbourhood_purity(x, labels, k=4) == pytest.approx(hits / (30 * 4))


def test_batch_similarities_are_what_the_loss_sees(minilm, sentences):
    batch = sentences[:8]
    minilm.eval()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    sim = analysis.batch_similarities(minilm, batch, max_length=16, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in minilm.modules())

    assert torch.equal(analysis.batch_similarities(minilm, batch, 16, seed=3), sim)
    assert not torch.equal(analysis.batch_similarities(minilm, batch, 16, seed=4), sim)
    minilm.train()
    try:
        torch.manual_seed(3)
        u, v = minilm(minilm.tokenize(batch, 16))
        assert torch.equal(analysis.batch_similarities(minilm, batch, 16, seed=3), sim)
        assert minilm.training
    finally:
        minilm.eval()
    torch.testing.assert_close(sim, torch.cosine_similarity(u[:, None], v[None], dim=-1).detach())
    assert (sim.dtype, sim.device.type, sim.requires_grad) == (torch.float32, "cpu", False)
    # Two views of one sentence are nearest to each other, and dropout keeps them apart.
    assert torch.equal(sim.argmax(dim=1), torch.arange(8))
    assert (sim.diagonal() < 1 - 1e-4).all()


@pytest.mark.parametrize("anchor", [0, 7])
def test_the_negatives_of_an_anchor_carry_the_gradient_of_its_own_loss(sim, anchor):
    objectives = kinds(0.1, 0.4)
    table = analysis.anchor_negatives(sim, anchor, objectives)
    assert sorted(table["negative"]) == [j for j in range(20) if j != anchor]
    assert table["similarity"].is_monotonic_decreasing
    assert list(table)[2:] == [name(x) for x in objectives]
    for objective in objectives:
        by_hand = pulls_by_hand(sim, objective)[anchor][table["negative"]]
        np.testing.assert_allclose(table[name(objective)], by_hand, rtol=1e-4, atol=1e-7)
    assert list(analysis.anchor_negatives(sim, anchor))[2:] == [
        "InfoNCE",
        "Focal-InfoNCE",
        "Hardness-InfoNCE",
    ]


@pytest.mark.parametrize("quantile", [0.0, 0.5, 0.9])
def test_likely_false_negatives_by_brute_force(sim, quantile):
    labels = ["a", "b", "c", "d"] * 5
    mean = {(i, j): (sim[i, j].item() + sim[j, i].item()) / 2 for i in range(20) for j in range(i)}
    ordered = sorted(mean.values())
    expected = {
        (j, i): value
        for (i, j), value in mean.items()
        if labels[i] == labels[j]
        and sum(other <= value for other in ordered) > quantile * (len(ordered) - 1)
    }
    table = analysis.likely_false_negatives(sim, labels, quantile)
    found = dict(zip(zip(table["i"], table["j"], strict=True), table["similarity"], strict=True))
    assert found == pytest.approx(expected)
    assert table["similarity"].is_monotonic_decreasing
    assert expected


@pytest.fixture(scope="module")
def models():
    """Three models of 150 sentences: five crowds, each model with noise of its own."""
    rng = np.random.default_rng(0)
    crowds = np.repeat(rng.normal(size=(5, 16)), 30, axis=0) + 0.4 * rng.normal(size=(150, 16))
    return {name: crowds + 0.2 * rng.normal(size=crowds.shape) for name in ("a", "b", "c")}


def map_of(x, **settings):
    return analysis.aligned_maps({"alone": x}, **settings)["alone"]


def test_aligned_maps_are_deterministic_and_closer_than_maps_of_their_own(models):
    maps = analysis.aligned_maps(models)
    again = analysis.aligned_maps(models)
    assert list(maps) == list(models)
    for each in models:
        assert maps[each].shape == (150, 2)
        np.testing.assert_array_equal(maps[each], again[each])
    alone = {name: map_of(x) for name, x in models.items()}

    def moved(maps):
        """Mean way of a sentence from one map to the next, beside the maps' own extent."""
        places = list(maps.values())
        ways = [np.linalg.norm(x - y, axis=1).mean() for x, y in pairwise(places)]
        return np.mean(ways) / np.mean([np.linalg.norm(x - x.mean(0), axis=1) for x in places])

    assert moved(maps) < 0.5 * moved(alone)


def test_a_map_leaves_torch_its_number_of_threads():
    code = (
        "import numpy, torch; from fcse.analysis import aligned_maps\n"
        "aligned_maps({'a': numpy.random.default_rng(0).normal(size=(40, 8))})\n"
        "print(torch.get_num_threads())"
    )
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | threads, capture_output=True, text=True
    )
    assert done.stdout == "1\n", done.stderr


def test_what_a_map_compiles_is_kept_for_other_processes(models):
    from umap import layouts

    map_of(next(iter(models.values())))
    kept = Path(layouts.rdist.stats.cache_path)
    assert list(kept.glob("layouts.rdist-*.nbc"))


def test_a_single_model_gets_a_map_of_its_own(models):
    xy = map_of(models["a"], seed=1)
    assert xy.shape == (150, 2)
    np.testing.assert_array_equal(xy, map_of(models["a"], seed=1))
    assert not np.array_equal(xy, map_of(models["a"], seed=2))


def test_trustworthiness_by_brute_force(models):
    x, k = models["a"], 7
    xy = np.random.default_rng(1).normal(size=(150, 2))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    cost = 0
    for i in range(150):
        others = [j for j in range(150) if j != i]
        rank = {j: r for r, j in enumerate(sorted(others, key=lambda j: -(unit[i] @ unit[j])), 1)}
        nearest = sorted(others, key=lambda j: np.linalg.norm(xy[i] - xy[j]))[:k]
        cost += sum(rank[j] - k for j in nearest if rank[j] > k)
    expected = 1 - 2 * cost / (150 * k * (2 * 150 - 3 * k - 1))
    assert analysis.map_trustworthiness(x, xy, k) == pytest.approx(expected)
    assert analysis.map_trustworthiness(x, map_of(x), k) > 0.9 > expected
