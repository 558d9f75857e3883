"""Numbers behind the pictures, against brute force."""

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


def test_ranked_negatives_name_the_right_sentences(sim):
    table = analysis.ranked_negatives(sim, [str(i) for i in range(20)])
    assert len(table) == 20 * 19
    assert table["similarity"].is_monotonic_decreasing
    for _, row in table.head(5).iterrows():
        assert sim[int(row["anchor"]), int(row["negative"])].item() == row["similarity"]


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
