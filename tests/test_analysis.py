"""Numbers behind the pictures, against brute force."""

import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch

from fcse import analysis, losses


@pytest.fixture
def sim():
    matrix = torch.rand(20, 20, generator=torch.Generator().manual_seed(3)) * 1.6 - 0.7
    return matrix.fill_diagonal_(0.9)


@pytest.mark.parametrize("objective", ["info_nce", "focal_info_nce"])
def test_negative_pulls_are_the_gradient_of_each_row(sim, objective):
    x = sim.double().requires_grad_()
    modulate = "both" if objective == "focal_info_nce" else "none"
    (20 * losses.focal_info_nce(x, 0.1, 0.3, modulate)).backward()
    s, pull = analysis.negative_pulls(sim, objective, temperature=0.1)
    negative = ~torch.eye(20, dtype=torch.bool)
    np.testing.assert_allclose(pull, x.grad[negative].numpy(), rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(s, sim[negative].numpy())


def test_deciles_share_the_whole_pull(sim):
    table = analysis.pull_by_decile(sim, temperature=0.5)
    for objective, rows in table.groupby("objective"):
        s, pull = analysis.negative_pulls(sim, objective, temperature=0.5)
        ranks = s.argsort().argsort()
        total = np.abs(pull).sum()
        expected = [np.abs(pull[ranks // 38 == d]).sum() / total for d in range(10)]
        np.testing.assert_allclose(rows["share"], expected, rtol=1e-5)
        assert rows["similarity"].is_monotonic_increasing
        assert analysis.hardest_share(sim, objective, 0.5) == pytest.approx(expected[-1], rel=1e-5)


@pytest.mark.parametrize(
    ("key", "positive", "negative"),
    [
        ("info_nce", lambda s: s, lambda s: s),
        ("positive", lambda s: s * s, lambda s: s),
        ("negative", lambda s: s, lambda s: s * (s + 0.4)),
        ("focal_info_nce", lambda s: s * s, lambda s: s * (s + 0.4)),
        ("hardness_info_nce", lambda s: s, lambda s: s * (1 + 0.1 * analysis.ALPHA)),
    ],
)
def test_curves_are_the_formulas(key, positive, negative):
    table = analysis.curves(0.1, 0.4, [key])
    s = table["similarity"].to_numpy()
    np.testing.assert_allclose(table["logit"], negative(s) / 0.1, atol=1e-12)
    np.testing.assert_allclose(table["positive_logit"], positive(s) / 0.1, atol=1e-12)
    step = 1e-6
    if key == "hardness_info_nce":
        negative = positive  # the weight is a constant to the gradient
    for column, formula in (("slope", negative), ("positive_slope", positive)):
        slope = (formula(s + step) - formula(s - step)) / (2 * step) / 0.1
        np.testing.assert_allclose(table[column], slope, atol=1e-6)


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
    x = sim.clone().requires_grad_()
    table = analysis.anchor_negatives(sim, anchor, 0.1, 0.4)
    assert sorted(table["negative"]) == [j for j in range(20) if j != anchor]
    assert table["similarity"].is_monotonic_decreasing
    for key, loss in (
        ("info_nce", losses.info_nce(x, 0.1)),
        ("focal_info_nce", losses.focal_info_nce(x, 0.1, 0.4)),
        ("hardness_info_nce", losses.hardness_info_nce(x, 0.1)),
    ):
        (gradient,) = torch.autograd.grad(20 * loss, x)
        by_hand = gradient[anchor][torch.tensor(table["negative"])]
        np.testing.assert_allclose(table[key], by_hand, rtol=1e-4, atol=1e-7)


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


def test_aligned_maps_are_deterministic_and_closer_than_maps_of_their_own(models):
    maps = analysis.aligned_maps(models)
    again = analysis.aligned_maps(models)
    assert list(maps) == list(models)
    for name in models:
        assert maps[name].shape == (150, 2)
        np.testing.assert_array_equal(maps[name], again[name])
    alone = {name: analysis.umap_map(x) for name, x in models.items()}

    def moved(maps):
        """Mean way of a sentence from one map to the next, beside the maps' own extent."""
        places = list(maps.values())
        ways = [np.linalg.norm(x - y, axis=1).mean() for x, y in pairwise(places)]
        return np.mean(ways) / np.mean([np.linalg.norm(x - x.mean(0), axis=1) for x in places])

    assert moved(maps) < 0.5 * moved(alone)


def test_a_map_leaves_torch_its_number_of_threads():
    code = (
        "import numpy, torch; from fcse.analysis import umap_map\n"
        "umap_map(numpy.random.default_rng(0).normal(size=(40, 8)))\n"
        "print(torch.get_num_threads())"
    )
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | threads, capture_output=True, text=True
    )
    assert done.stdout == "1\n", done.stderr


def test_a_single_model_gets_a_map_of_its_own(models):
    (xy,) = analysis.aligned_maps({"a": models["a"]}, seed=1).values()
    np.testing.assert_array_equal(xy, analysis.umap_map(models["a"], seed=1))
    assert not np.array_equal(xy, analysis.umap_map(models["a"], seed=2))


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
    assert analysis.map_trustworthiness(x, analysis.umap_map(x), k) > 0.9 > expected
