"""The losses against their formulas written out in float64, and against autograd."""

import numpy as np
import pytest
import torch

from fcse.losses import (
    check_parameters,
    effective_modulation,
    focal_info_nce,
    gradient_weights,
    hardness_info_nce,
    info_nce,
    logits,
    loss,
    similarity_matrix,
)

MODULATES = ("both", "positive", "negative", "none")
PARAMETERS = [(0.05, 0.3), (0.01, 0.0), (0.5, -0.2), (1.0, 1.0)]
SHAPES = [(1, 1), (6, 6), (6, 11)]


def similarities(rows, columns, seed=0):
    """Random similarities with the values where a formula is most likely to go wrong."""
    sim = np.random.default_rng(seed).uniform(-1, 1, (rows, columns))
    corners = [(0, 0, 1.0), (1, 1, 0.0), (2, 2, -1.0), (0, 1, 1.0), (1, 0, 0.0), (2, 0, -1.0)]
    for row, column, value in corners:
        if row < rows and column < columns:
            sim[row, column] = value
    return sim


def logits_by_hand(sim, temperature, m, modulate):
    out = np.empty_like(sim)
    for i in range(sim.shape[0]):
        for j in range(sim.shape[1]):
            s = sim[i, j]
            if i == j and modulate in ("both", "positive"):
                out[i, j] = s * s / temperature
            elif i != j and modulate in ("both", "negative"):
                out[i, j] = s * (s + m) / temperature
            else:
                out[i, j] = s / temperature
    return out


def loss_by_hand(sim, temperature, m, modulate):
    rows = []
    for i, row in enumerate(logits_by_hand(sim, temperature, m, modulate)):
        top = row.max()
        rows.append(top + np.log(np.exp(row - top).sum()) - row[i])
    return np.mean(rows)


def weights_by_hand(sim, temperature, m, modulate):
    rows = logits_by_hand(sim, temperature, m, modulate)
    out = np.empty_like(sim)
    for i, row in enumerate(rows):
        p = np.exp(row - row.max())
        p /= p.sum()
        for j, s in enumerate(sim[i]):
            if i == j:
                slope = 2 * s if modulate in ("both", "positive") else 1.0
                out[i, j] = (p[j] - 1) * slope / temperature
            else:
                slope = 2 * s + m if modulate in ("both", "negative") else 1.0
                out[i, j] = p[j] * slope / temperature
    return out / len(sim)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("modulate", MODULATES)
@pytest.mark.parametrize(("temperature", "m"), PARAMETERS)
def test_logits_and_loss_equal_the_formulas(shape, modulate, temperature, m):
    sim = similarities(*shape)
    wide = torch.tensor(sim)
    np.testing.assert_allclose(
        logits(wide, temperature, m, modulate).numpy(),
        logits_by_hand(sim, temperature, m, modulate),
        rtol=1e-12,
        atol=1e-12,
    )
    expected = loss_by_hand(sim, temperature, m, modulate)
    loss = focal_info_nce(wide, temperature, m, modulate)
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    single = focal_info_nce(wide.float(), temperature, m, modulate)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0])
def test_info_nce_is_cross_entropy_of_scaled_similarities(shape, temperature):
    sim = similarities(*shape, seed=1)
    expected = loss_by_hand(sim, temperature, 0.0, "none")
    wide = torch.tensor(sim)
    assert info_nce(wide, temperature).item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    # m has no say where nothing is modulated.
    for m in (-0.5, 0.0, 0.3):
        assert focal_info_nce(wide, temperature, m, "none") == info_nce(wide, temperature)


def test_defaults_are_the_published_ones():
    sim = torch.tensor(similarities(6, 6, seed=2))
    assert focal_info_nce(sim) == focal_info_nce(sim, temperature=0.05, m=0.3, modulate="both")
    assert info_nce(sim) == info_nce(sim, temperature=0.05)
    assert focal_info_nce(sim).item() == pytest.approx(loss_by_hand(sim.numpy(), 0.05, 0.3, "both"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("modulate", MODULATES)
@pytest.mark.parametrize(("temperature", "m"), PARAMETERS)
def test_gradient_weights_equal_autograd_and_closed_form(shape, modulate, temperature, m):
    sim = torch.tensor(similarities(*shape, seed=3), requires_grad=True)
    for objective in ("info_nce", "focal_info_nce"):
        if objective == "info_nce":
            loss, part = info_nce(sim, temperature), "none"
        else:
            loss, part = focal_info_nce(sim, temperature, m, modulate), modulate
        (autograd,) = torch.autograd.grad(loss, sim)
        weights = gradient_weights(sim.detach(), objective, temperature, m, modulate)
        torch.testing.assert_close(weights, autograd, rtol=1e-10, atol=1e-12)
        by_hand = weights_by_hand(sim.detach().numpy(), temperature, m, part)
        np.testing.assert_allclose(weights.numpy(), by_hand, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("modulate", MODULATES)
def test_gradcheck(modulate):
    sim = torch.tensor(similarities(4, 6, seed=4), requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: focal_info_nce(s, 0.1, 0.3, modulate), [sim])


def test_gradcheck_through_the_cosine():
    generator = torch.Generator().manual_seed(0)
    u, v = (
        torch.randn(4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
        for _ in range(2)
    )
    assert torch.autograd.gradcheck(lambda a, b: focal_info_nce(similarity_matrix(a, b)), [u, v])


@pytest.mark.parametrize("modulate", MODULATES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("positive", "negative"), [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_finite_at_the_ends_of_the_scale(modulate, dtype, positive, negative):
    sim = torch.full((8, 8), float(negative))
    sim = sim.fill_diagonal_(positive).to(dtype).requires_grad_()
    loss = focal_info_nce(sim, 0.01, 0.3, modulate)
    loss.backward()
    assert loss.isfinite()
    assert sim.grad.isfinite().all()
    assert gradient_weights(sim.detach(), "focal_info_nce", 0.01, 0.3, modulate).isfinite().all()


@pytest.mark.parametrize("modulate", MODULATES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(modulate, dtype):
    half = torch.tensor(similarities(6, 9, seed=5)).to(dtype)
    for function in (logits, focal_info_nce):
        result = function(half, 0.05, 0.3, modulate)
        assert result.dtype == torch.float32
        assert torch.equal(result, function(half.float(), 0.05, 0.3, modulate))
    assert torch.equal(info_nce(half), info_nce(half.float()))
    for objective in ("info_nce", "focal_info_nce"):
        weights = gradient_weights(half, objective, modulate=modulate)
        assert weights.dtype == torch.float32
        assert torch.equal(weights, gradient_weights(half.float(), objective, modulate=modulate))


def test_float64_stays_float64():
    sim = torch.tensor(similarities(5, 7))
    u = torch.randn(3, 4, dtype=torch.float64)
    for result in (logits(sim), info_nce(sim), gradient_weights(sim), similarity_matrix(u, u)):
        assert result.dtype == torch.float64


def test_similarity_matrix_is_the_cosine():
    rng = np.random.default_rng(6)
    u, v = rng.normal(size=(5, 16)), rng.normal(size=(8, 16))
    u[2] = 0
    expected = np.zeros((5, 8))
    for i, a in enumerate(u):
        for j, b in enumerate(v):
            if i != 2:
                expected[i, j] = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    wide = similarity_matrix(torch.tensor(u), torch.tensor(v))
    np.testing.assert_allclose(wide.numpy(), expected, atol=1e-12)
    single = similarity_matrix(torch.tensor(u).float(), torch.tensor(v).float())
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, atol=1e-6)


def test_similarity_matrix_keeps_float32_inside_autocast():
    generator = torch.Generator().manual_seed(7)
    u, v = torch.randn(2, 32, 64, generator=generator).unbind()
    outside = similarity_matrix(u, v)
    with torch.autocast("cpu", torch.bfloat16):
        # The guard only means something where a plain product does lose precision.
        assert (u @ v.T).dtype == torch.bfloat16
        inside = similarity_matrix(u, v)
        half = similarity_matrix(u.bfloat16(), v.bfloat16())
    assert inside.dtype == half.dtype == torch.float32
    assert torch.equal(inside, outside)
    assert torch.equal(half, similarity_matrix(u.bfloat16().float(), v.bfloat16().float()))


@pytest.mark.parametrize("m", [0.0, 0.3, 0.8])
def test_modulated_negatives_have_a_resting_point(m):
    s = torch.tensor([-0.95, -m / 2 - 0.02, -m / 2 + 0.02, 0.5, 0.9], dtype=torch.float64)
    sim = torch.cat([torch.tensor([[0.8]], dtype=torch.float64), s[None]], dim=1)
    focal = gradient_weights(sim, "focal_info_nce", 0.05, m, "both")[0, 1:]
    plain = gradient_weights(sim, "info_nce", 0.05, m, "both")[0, 1:]
    below = s < -m / 2
    assert torch.equal(focal < 0, below)
    assert (focal[~below] > 0).all()
    assert (plain > 0).all()

    descended = sim.clone().requires_grad_()
    focal_info_nce(descended, 0.05, m).backward()
    step = (-1e-3 * descended.grad)[0, 1:]
    assert (step[below] > 0).all()
    assert (step[~below] < 0).all()


@pytest.mark.parametrize(
    ("temperature", "m", "modulate"),
    [
        (0.0, 0.3, "both"),
        (-0.05, 0.3, "both"),
        (float("nan"), 0.3, "both"),
        (float("inf"), 0.3, "both"),
        (0.05, float("nan"), "both"),
        (0.05, float("inf"), "both"),
        (0.05, 0.3, "neither"),
        (0.05, 0.3, ""),
    ],
)
def test_bad_parameters_are_refused(temperature, m, modulate):
    sim = torch.tensor(similarities(3, 3))
    with pytest.raises(ValueError, match=r"temperature|m must|modulate"):
        check_parameters(temperature, m, modulate)
    for function in (logits, focal_info_nce):
        with pytest.raises(ValueError, match=r"temperature|m must|modulate"):
            function(sim, temperature, m, modulate)
    with pytest.raises(ValueError, match=r"temperature|m must|modulate"):
        gradient_weights(sim, "focal_info_nce", temperature, m, modulate)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_info_nce_refuses_a_bad_temperature(temperature):
    with pytest.raises(ValueError, match="temperature"):
        info_nce(torch.eye(3), temperature)


def test_unknown_objective_is_refused():
    with pytest.raises(ValueError, match="objective 'triplet'"):
        effective_modulation("triplet", "both")
    with pytest.raises(ValueError, match="objective 'triplet'"):
        gradient_weights(torch.eye(3), "triplet")


@pytest.mark.parametrize("modulate", MODULATES)
def test_info_nce_applies_no_modulation(modulate):
    assert effective_modulation("info_nce", modulate) == "none"
    assert effective_modulation("focal_info_nce", modulate) == modulate


@pytest.mark.parametrize("shape", [(4, 3), (3,), (), (0, 0), (0, 3), (2, 3, 3)])
def test_shapes_that_are_no_batch_are_refused(shape):
    sim = torch.zeros(shape)
    for function in (logits, focal_info_nce, info_nce, gradient_weights):
        with pytest.raises(ValueError, match=r"sim must be \(N, M\)"):
            function(sim)


@pytest.mark.parametrize(("left", "right"), [((3, 4), (3, 5)), ((4,), (3, 4)), ((3, 4), (2, 3, 4))])
def test_similarity_of_unlike_shapes_is_refused(left, right):
    with pytest.raises(ValueError, match="u and v must be"):
        similarity_matrix(torch.zeros(left), torch.zeros(right))


@pytest.mark.parametrize("modulate", MODULATES)
@pytest.mark.parametrize(("temperature", "m"), PARAMETERS)
def test_stop_gradient_keeps_the_loss_and_changes_the_slopes(modulate, temperature, m):
    sim = torch.tensor(similarities(6, 11), requires_grad=True)
    stopped = focal_info_nce(sim, temperature, m, modulate, stop_gradient=True)
    assert torch.equal(stopped, focal_info_nce(sim, temperature, m, modulate))
    (gradient,) = torch.autograd.grad(stopped, sim)
    rows = logits_by_hand(sim.detach().numpy(), temperature, m, modulate)
    p = np.exp(rows - rows.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    s = sim.detach().numpy()
    one = np.ones_like(s)
    slope = s + m if modulate in ("both", "negative") else one
    own = s if modulate in ("both", "positive") else one
    slope = np.where(np.eye(6, 11, dtype=bool), own, slope)
    by_hand = (p - np.eye(6, 11)) * slope / (6 * temperature)
    np.testing.assert_allclose(gradient.numpy(), by_hand, atol=1e-12)
    closed = gradient_weights(sim.detach(), "focal_info_nce", temperature, m, modulate, True)
    np.testing.assert_allclose(closed.numpy(), by_hand, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 9.0])
@pytest.mark.parametrize("temperature", [0.02, 0.05, 1.0])
def test_hardness_weight_equals_the_formula(alpha, temperature):
    s = similarities(6, 11)
    negative = ~np.eye(6, 11, dtype=bool)
    rows = s / temperature + alpha * s * negative
    p = np.exp(rows - rows.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    sim = torch.tensor(s, requires_grad=True)
    value = hardness_info_nce(sim, temperature, alpha)
    assert value.item() == pytest.approx(-np.log(np.diagonal(p)).mean())
    (gradient,) = torch.autograd.grad(value, sim)
    by_hand = (p - ~negative) / (6 * temperature)
    np.testing.assert_allclose(gradient.numpy(), by_hand, atol=1e-12)
    closed = gradient_weights(sim.detach(), "hardness_info_nce", temperature, alpha=alpha)
    np.testing.assert_allclose(closed.numpy(), by_hand, atol=1e-12)


def test_hardness_weight_is_that_of_sentence_transformers():
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 8, 5, generator=generator)
    peer = MultipleNegativesRankingLoss(
        None, scale=20, hardness_mode="in_batch_negatives", hardness_strength=9
    )
    theirs = peer.compute_loss_from_embeddings([u, v], None)
    assert hardness_info_nce(similarity_matrix(u, v)).item() == pytest.approx(theirs.item())


def test_without_weight_hardness_is_info_nce():
    sim = torch.tensor(similarities(6, 6))
    assert torch.equal(hardness_info_nce(sim, alpha=0), info_nce(sim))


@pytest.mark.parametrize("alpha", [-1.0, float("nan"), float("inf")])
def test_bad_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        hardness_info_nce(torch.eye(3), alpha=alpha)


def test_a_loss_by_its_name():
    sim = torch.tensor(similarities(6, 6))
    assert torch.equal(loss(sim, "info_nce", 0.1), info_nce(sim, 0.1))
    named = loss(sim, "focal_info_nce", 0.1, 0.2, "positive", stop_gradient=True)
    assert torch.equal(named, focal_info_nce(sim, 0.1, 0.2, "positive"))
    assert torch.equal(loss(sim, "hardness_info_nce", 0.1), hardness_info_nce(sim, 0.1))
    with pytest.raises(ValueError, match="objective 'triplet'"):
        loss(sim, "triplet")


def masked_loss_and_weights_by_hand(s, ids, objective, temperature, m, modulate, stopped, alpha):
    """Loss and dL/dsim entry by entry, over the candidates that a row is left with."""
    focal = objective == "focal_info_nce"
    value, out = 0.0, np.zeros_like(s)
    for i in range(len(s)):
        kept = [j for j in range(s.shape[1]) if j == i or ids[j] != ids[i]]
        logit, slope = {}, {}
        for j in kept:
            shift = 0.0 if j == i else m
            modulated = focal and modulate in ("both", "positive" if j == i else "negative")
            logit[j] = (s[i, j] * (s[i, j] + shift) if modulated else s[i, j]) / temperature
            slope[j] = s[i, j] * (1 if stopped else 2) + shift if modulated else 1.0
            if objective == "hardness_info_nce" and j != i:
                logit[j] += alpha * s[i, j]
        top = max(logit.values())
        total = sum(np.exp(x - top) for x in logit.values())
        value += top + np.log(total) - logit[i]
        for j in kept:
            p = np.exp(logit[j] - top) / total
            out[i, j] = (p - (j == i)) * slope[j] / temperature
    return value / len(s), out / len(s)


OBJECTIVES = ("info_nce", "focal_info_nce", "hardness_info_nce")
REPEATED = {
    "none": range(11),
    "a pair": [0, 1, 2, 1, 4, 5, 6, 7, 8, 9, 10],
    "further negatives": [0, 1, 2, 3, 4, 5, 0, 0, 5, 9, 9],
    "two sentences": [0, 1] * 5 + [0],
    "one sentence": [7] * 11,
}


@pytest.mark.parametrize("ids", REPEATED.values(), ids=REPEATED)
@pytest.mark.parametrize("columns", [6, 11])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("modulate", MODULATES)
@pytest.mark.parametrize("stopped", [False, True])
def test_repeated_sentences_are_left_out(ids, columns, objective, modulate, stopped):
    sim = torch.tensor(similarities(6, columns, seed=8), requires_grad=True)
    ids = torch.tensor(ids)[:columns]
    arguments = (objective, 0.05, 0.3, modulate, stopped, 9.0)
    value, by_hand = masked_loss_and_weights_by_hand(sim.detach().numpy(), ids, *arguments)
    masked = loss(sim, *arguments, ids)
    assert masked.item() == pytest.approx(value, rel=1e-12, abs=1e-12)
    (autograd,) = torch.autograd.grad(masked, sim)
    np.testing.assert_allclose(autograd.numpy(), by_hand, rtol=1e-10, atol=1e-12)
    closed = gradient_weights(sim.detach(), *arguments, ids)
    np.testing.assert_allclose(closed.numpy(), by_hand, rtol=1e-10, atol=1e-12)
    repeats = (ids[:6, None] == ids) & ~torch.eye(6, columns, dtype=torch.bool)
    assert (autograd[repeats] == 0).all()
    assert (closed[repeats] == 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_row_without_negatives_costs_nothing(objective):
    sim = torch.tensor(similarities(4, 4, seed=9)).float().requires_grad_()
    ids = torch.zeros(4, dtype=torch.int64)
    value = loss(sim, objective, sentence_ids=ids)
    assert value == 0
    value.backward()
    assert (sim.grad == 0).all()
    assert (gradient_weights(sim.detach(), objective, sentence_ids=ids) == 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ids_that_all_differ_change_nothing(objective):
    sim = torch.tensor(similarities(6, 11, seed=10))
    ids = torch.arange(11).flip(0)
    assert torch.equal(loss(sim, objective, sentence_ids=ids), loss(sim, objective))
    assert torch.equal(
        gradient_weights(sim, objective, sentence_ids=ids), gradient_weights(sim, objective)
    )


@pytest.mark.parametrize("shape", [(6,), (12,), (11, 1), ()])
def test_ids_that_are_not_one_a_column_are_refused(shape):
    sim, ids = torch.zeros(6, 11), torch.zeros(shape, dtype=torch.int64)
    for function in (logits, loss, gradient_weights):
        with pytest.raises(ValueError, match=r"sentence_ids must be \(11,\)"):
            function(sim, sentence_ids=ids)
