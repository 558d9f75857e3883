"""The losses against their formulas written out in float64, and against autograd."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

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


def by_hand(s, objective, temperature, m, modulate, alpha, groups, margin, teacher, focal_weight):
    """The loss entry by entry, the margin through the angle itself."""
    focal = objective == "focal_info_nce"
    total = 0.0
    for i in range(len(s)):
        logit = {}
        for j in range(s.shape[1]):
            if j != i and any(ids[j] == ids[i] for ids in groups):
                continue
            x, shift, part = s[i, j], m, "negative"
            if j == i:
                shift, part = 0.0, "positive"
            elif np.arccos(x) > margin:
                x = np.cos(np.arccos(x) - (1 - teacher[i, j]) * margin)
            if focal and modulate in ("both", part):
                x *= x + shift
            logit[j] = x / temperature
            if objective == "hardness_info_nce" and j != i:
                logit[j] += alpha * s[i, j]
        top = max(logit.values())
        log_p = logit[i] - top - np.log(sum(np.exp(x - top) for x in logit.values()))
        total -= (1 - np.exp(log_p)) * log_p if focal_weight else log_p
    return total / len(s)


GROUPS = {
    "none": torch.arange(11)[None],
    "one": torch.tensor([[0, 1, 2, 1, 4, 5, 0, 0, 5, 9, 9]]),
    "two": torch.tensor([[0, 1, 2, 1, 4, 5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 5, 5, 8, 1, 2, 7]]),
}
TEACHER = torch.tensor(similarities(6, 11, seed=20))
FUNCTIONS = (loss, gradient_weights)
EXTENSIONS = [(0.0, False), (0.0, True), (0.05, False), (0.8, True), (1.5, False)]


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(("margin", "focal_weight"), EXTENSIONS)
@pytest.mark.parametrize("alpha", [0.0, 9.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("modulate", MODULATES)
@pytest.mark.parametrize("stopped", [False, True])
def test_extensions_equal_the_formulas_and_autograd(
    groups, margin, focal_weight, alpha, objective, modulate, stopped
):
    sim = torch.tensor(similarities(6, 11, seed=21), requires_grad=True)
    options = {"margin": margin, "teacher": TEACHER, "focal_weight": focal_weight}
    arguments = (objective, 0.2, 0.3, modulate, stopped, alpha, groups)
    value = loss(sim, *arguments, **options)
    expected = by_hand(
        sim.detach().numpy(),
        objective,
        0.2,
        0.3,
        modulate,
        alpha,
        groups.tolist(),
        margin,
        TEACHER.numpy(),
        focal_weight,
    )
    assert value.item() == pytest.approx(expected, rel=1e-11, abs=1e-12)
    (autograd,) = torch.autograd.grad(value, sim)
    closed = gradient_weights(sim.detach(), *arguments, **options)
    torch.testing.assert_close(closed, autograd, rtol=1e-10, atol=1e-13)


def test_one_numbering_is_that_of_a_vector():
    sim, ids = torch.tensor(similarities(6, 11)), GROUPS["one"][0]
    for function in (logits, loss, gradient_weights):
        one = function(sim, sentence_ids=ids[None])
        assert torch.equal(one, function(sim, sentence_ids=ids))


def test_numberings_eliminate_the_pairs_of_each():
    sim, ids = torch.tensor(similarities(6, 11)), GROUPS["two"]
    gone = [logits(sim, sentence_ids=x) == -torch.inf for x in (ids, *ids)]
    assert torch.equal(gone[0], gone[1] | gone[2])
    assert gone[1].any() and gone[2].any() and not torch.equal(gone[1], gone[2])
    assert (gradient_weights(sim, sentence_ids=ids)[gone[0]] == 0).all()


class Operations(TorchDispatchMode):
    """Writes down the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_options_that_are_off_change_no_bit_and_cost_no_operation(dtype):
    sim = torch.tensor(similarities(6, 11)).to(dtype).requires_grad_()
    off = {"margin": 0.0, "teacher": TEACHER, "focal_weight": False}
    s, target, positives = sim, torch.arange(6), torch.eye(6, 11, dtype=torch.bool)
    written_out = {
        "info_nce": lambda: F.cross_entropy(s / 0.05, target),
        "focal_info_nce": lambda: F.cross_entropy(
            torch.where(positives, s * s, s * (s + 0.3)) / 0.05, target
        ),
    }
    for objective, plain in written_out.items():
        value, expected = loss(sim, objective, **off), plain()
        assert torch.equal(value, expected)
        ours, theirs = (torch.autograd.grad(x, sim)[0] for x in (value, expected))
        assert torch.equal(ours, theirs)
    for function in (loss, gradient_weights):
        with Operations() as default:
            expected = function(sim)
        with Operations() as switched_off:
            assert torch.equal(function(sim, **off), expected)
        # The comparison itself is the one operation more.
        assert switched_off.names[: len(default.names)] == default.names
        assert len(switched_off.names) <= len(default.names) + 1


def test_a_margin_leaves_positives_and_near_negatives_alone():
    sim = torch.tensor([[0.2, np.cos(0.3), np.cos(0.5)], [1.0, 0.1, -1.0]])
    turned = logits(sim, 1.0, modulate="none", margin=0.4, teacher=torch.zeros(2, 3))
    same = torch.tensor([[True, True, False], [True, True, False]])
    assert torch.equal(turned == sim, same)
    expected = torch.tensor([np.cos(0.1), np.cos(np.pi - 0.4)], dtype=turned.dtype)
    torch.testing.assert_close(turned[~same], expected)
    # Where the teacher finds two sentences equal nothing is turned.
    alike = logits(sim, 1.0, modulate="none", margin=0.4, teacher=torch.ones(2, 3))
    assert torch.equal(alike, sim)


def test_the_hardness_weight_stays_one_of_s():
    sim = torch.tensor(similarities(6, 11))
    options = {"modulate": "none", "margin": 0.2, "teacher": TEACHER}
    added = logits(sim, alpha=9.0, **options) - logits(sim, **options)
    positives = torch.eye(6, 11, dtype=torch.bool)
    torch.testing.assert_close(added, (9 * sim).masked_fill(positives, 0))


def test_a_teacher_is_a_constant():
    sim = torch.tensor(similarities(6, 11), requires_grad=True)
    teacher = TEACHER.clone().requires_grad_()
    loss(sim, margin=0.2, teacher=teacher).backward()
    assert teacher.grad is None
    assert sim.grad.isfinite().all()


@pytest.mark.parametrize("modulate", MODULATES)
@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("margin", [1e-6, 0.05, 1.57])
def test_a_margin_is_safe_at_the_ends_of_the_scale(modulate, stopped, margin):
    tick = torch.finfo(torch.float32).eps
    ends = torch.tensor([1.0, 1 + tick, 1 - tick / 2, 0.999])
    sim = torch.cat([ends, -ends]).repeat(8, 1).requires_grad_()
    teacher = torch.linspace(-1, 1, 64).reshape(8, 8)
    arguments = {"modulate": modulate, "stop_gradient": stopped, "margin": margin}
    arguments |= {"teacher": teacher, "focal_weight": True}
    value = loss(sim, **arguments)
    value.backward()
    assert value.isfinite()
    assert sim.grad.isfinite().all()
    closed = gradient_weights(sim.detach(), **arguments)
    torch.testing.assert_close(closed, sim.grad, rtol=1e-4, atol=1e-6)


def test_a_margin_has_the_slope_of_the_angle():
    s = np.random.default_rng(22).uniform(-0.99, 0.9, (4, 7))
    t = TEACHER.numpy()[:4, :7]
    sim = torch.tensor(s, requires_grad=True)
    rows = logits(sim, 1.0, modulate="none", margin=0.3, teacher=torch.tensor(t))
    (slope,) = torch.autograd.grad(rows.sum(), sim)
    theta = np.arccos(s)
    expected = np.where(theta > 0.3, np.sin(theta - (1 - t) * 0.3) / np.sin(theta), 1)
    np.fill_diagonal(expected, 1)
    np.testing.assert_allclose(slope.numpy(), expected, rtol=1e-10)


def test_focal_weight_equals_the_formula():
    s = similarities(6, 11, seed=23)
    sim = torch.tensor(s, requires_grad=True)
    value = loss(sim, "info_nce", 0.5, focal_weight=True)
    p = np.exp(s / 0.5) / np.exp(s / 0.5).sum(axis=1, keepdims=True)
    own = np.diagonal(p)[:, None]
    assert value.item() == pytest.approx(np.mean(-(1 - own) * np.log(own)))
    assert value < loss(sim, "info_nce", 0.5)
    expected = ((1 - own) - own * np.log(own)) * (p - np.eye(6, 11)) / (6 * 0.5)
    (autograd,) = torch.autograd.grad(value, sim)
    np.testing.assert_allclose(autograd.numpy(), expected, rtol=1e-10, atol=1e-14)
    closed = gradient_weights(sim.detach(), "info_nce", 0.5, focal_weight=True)
    np.testing.assert_allclose(closed.numpy(), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("positive", [1.0, -1.0])
def test_focal_weight_is_stable_where_a_row_is_solved_or_lost(positive):
    sim = torch.full((8, 8), -positive).fill_diagonal_(positive).requires_grad_()
    value = loss(sim, "info_nce", 0.005, focal_weight=True)
    (gradient,) = torch.autograd.grad(value, sim)
    closed = gradient_weights(sim.detach(), "info_nce", 0.005, focal_weight=True)
    if positive == 1:  # p is 1
        assert value == 0
        assert (gradient == 0).all() and (closed == 0).all()
    else:  # p underflows, the weight is 1
        plain = loss(sim, "info_nce", 0.005)
        torch.testing.assert_close(value, plain)
        torch.testing.assert_close(gradient, torch.autograd.grad(plain, sim)[0])
        torch.testing.assert_close(closed, gradient)


@pytest.mark.parametrize("modulate", MODULATES)
def test_gradcheck_of_the_extensions(modulate):
    s = np.random.default_rng(24).uniform(-0.9, 0.9, (4, 6))
    options = {"margin": 0.3, "teacher": TEACHER[:4, :6], "focal_weight": True}
    ids = GROUPS["two"][:, :6]
    sim = torch.tensor(s, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: loss(x, "focal_info_nce", 0.2, 0.3, modulate, sentence_ids=ids, **options), [sim]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extensions_take_half_precision_in_float32(dtype):
    half, teacher = (torch.tensor(similarities(6, 11, seed=n)).to(dtype) for n in (5, 6))
    full = {"margin": 0.1, "teacher": teacher.float()}
    for function, more in [(logits, {}), *((f, {"focal_weight": True}) for f in FUNCTIONS)]:
        result = function(half, margin=0.1, teacher=teacher, **more)
        assert result.dtype == torch.float32
        assert torch.equal(result, function(half.float(), **full, **more))
    wide = loss(half.double(), margin=0.1, teacher=teacher)
    assert wide.dtype == torch.float64


@pytest.mark.parametrize("margin", [-0.1, np.pi / 2, float("nan"), float("inf")])
def test_bad_margin_is_refused(margin):
    with pytest.raises(ValueError, match="margin must be"):
        check_parameters(0.05, 0.3, "both", margin=margin)
    for function in (logits, *FUNCTIONS):
        with pytest.raises(ValueError, match="margin must be"):
            function(torch.eye(3), margin=margin, teacher=torch.eye(3))


def test_a_margin_without_its_teacher_is_refused():
    for function in (logits, *FUNCTIONS):
        with pytest.raises(ValueError, match="needs a teacher"):
            function(torch.eye(3), margin=0.1)
        with pytest.raises(ValueError, match="teacher must hold"):
            function(torch.eye(3), margin=0.1, teacher=torch.eye(4))


@pytest.mark.parametrize("shape", [(2, 6), (2, 12), (1, 2, 11)])
def test_numberings_that_are_not_one_a_column_are_refused(shape):
    sim, ids = torch.zeros(6, 11), torch.zeros(shape, dtype=torch.int64)
    for function in (logits, *FUNCTIONS):
        with pytest.raises(ValueError, match=r"or \(G, 11\)"):
            function(sim, sentence_ids=ids)
