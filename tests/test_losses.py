"""The losses against their formulas written out in float64, and against autograd."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import one_line_refusal
from formulas import (
    MODULATES,
    OBJECTIVES,
    OWN,
    SHARP,
    Weighed,
    WithoutSlopes,
    logit_and_slope,
    loss_and_weights,
    similarities,
    turned,
)

from fcse.errors import InputError
from fcse.losses import (
    PLAIN,
    Columns,
    focal_info_nce,
    gradient_weights,
    hardness_info_nce,
    info_nce,
    logits,
    loss,
    similarity_matrix,
)
from fcse.methods.adap_acse import turn
from fcse.methods.core_tuning import FocalWeight
from fcse.objectives import FocalInfoNCE, HardnessInfoNCE, InfoNCE, name

SHAPES = [(1, 1), (6, 6), (6, 11)]
FUNCTIONS = (logits, loss, gradient_weights)
GRID = (
    *map(InfoNCE, (0.01, 0.05, 1.0)),
    *(
        FocalInfoNCE(temperature, m, modulate, stopped)
        for temperature, m in [(0.05, 0.3), (0.01, 0.0), (0.5, -0.2), (1.0, 1.0)]
        for modulate in MODULATES
        for stopped in (False, True)
    ),
    *(HardnessInfoNCE(t, alpha) for t in (0.02, 0.05, 1.0) for alpha in (0.0, 1.0, 9.0)),
)


def by_autograd(sim, objective, columns=PLAIN):
    """The loss and its gradient."""
    value = loss(sim, objective, columns)
    return value, torch.autograd.grad(value, sim)[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("objective", GRID, ids=name)
def test_logits_loss_and_pulls_equal_the_formulas(shape, objective):
    s = similarities(*shape)
    by_hand = [
        [logit_and_slope(objective, x, i == j)[0] for j, x in enumerate(row)]
        for i, row in enumerate(s)
    ]
    expected, weights = loss_and_weights(s, objective)
    sim = torch.tensor(s, requires_grad=True)
    np.testing.assert_allclose(logits(sim, objective).detach(), by_hand, rtol=1e-12, atol=1e-12)
    value, autograd = by_autograd(sim, objective)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(autograd, weights, rtol=1e-10, atol=1e-12)
    closed = gradient_weights(sim, objective)
    np.testing.assert_allclose(closed, weights, rtol=1e-10, atol=1e-12)
    single = loss(sim.detach().float(), objective)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("named", "short", "published"),
    [
        ("info_nce", info_nce, InfoNCE(0.05)),
        ("focal_info_nce", focal_info_nce, FocalInfoNCE(0.05, 0.3, "both", False)),
        ("hardness_info_nce", hardness_info_nce, HardnessInfoNCE(0.05, 9.0)),
    ],
)
def test_defaults_are_the_published_ones(named, short, published):
    s = similarities(6, 6, seed=2)
    sim = torch.tensor(s)
    value, weights = loss_and_weights(s, published)
    assert short(sim).item() == pytest.approx(value, rel=1e-12)
    assert loss(sim, named).item() == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(gradient_weights(sim, named), weights, rtol=1e-10, atol=1e-12)
    if named == "focal_info_nce":  # what is meant where none is named
        assert loss(sim).item() == pytest.approx(value, rel=1e-12)
        np.testing.assert_allclose(gradient_weights(sim), weights, rtol=1e-10, atol=1e-12)


def test_short_forms_pass_on_what_they_are_given():
    s = similarities(6, 11)
    for short, arguments in (
        (info_nce, InfoNCE(0.1)),
        (focal_info_nce, FocalInfoNCE(0.1, 0.2, "negative", True)),
        (hardness_info_nce, HardnessInfoNCE(0.1, 2.0)),
    ):
        sim = torch.tensor(s, requires_grad=True)
        value = short(sim, *vars(arguments).values())
        expected, weights = loss_and_weights(s, arguments)
        assert value.item() == pytest.approx(expected, rel=1e-12)
        np.testing.assert_allclose(torch.autograd.grad(value, sim)[0], weights, atol=1e-12)


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
    objective = FocalInfoNCE(0.01, 0.3, modulate)
    value, gradient = by_autograd(sim, objective)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert gradient_weights(sim, objective).isfinite().all()


@pytest.mark.parametrize("objective", [*OBJECTIVES, *OWN], ids=name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(objective, dtype):
    half = torch.tensor(similarities(6, 9, seed=5)).to(dtype)
    for function in FUNCTIONS:
        result = function(half, objective)
        assert result.dtype == torch.float32
        assert torch.equal(result, function(half.float(), objective))


def test_float64_stays_float64():
    sim = torch.tensor(similarities(5, 7))
    u = torch.randn(3, 4, dtype=torch.float64)
    for result in (*(f(sim) for f in FUNCTIONS), info_nce(sim), similarity_matrix(u, u)):
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
    focal = gradient_weights(sim, FocalInfoNCE(0.05, m))[0, 1:]
    plain = gradient_weights(sim, InfoNCE(0.05))[0, 1:]
    below = s < -m / 2
    assert torch.equal(focal < 0, below)
    assert (focal[~below] > 0).all()
    assert (plain > 0).all()

    _, gradient = by_autograd(sim.clone().requires_grad_(), FocalInfoNCE(0.05, m))
    step = (-1e-3 * gradient)[0, 1:]
    assert (step[below] > 0).all()
    assert (step[~below] < 0).all()


def test_unknown_objective_is_refused():
    for function in FUNCTIONS:
        with pytest.raises(InputError, match="objective 'triplet'"):
            function(torch.eye(3), "triplet")


@pytest.mark.parametrize("shape", [(4, 3), (3,), (), (0, 0), (0, 3), (2, 3, 3)])
def test_shapes_that_are_no_batch_are_refused(shape):
    sim = torch.zeros(shape)
    for function in (*FUNCTIONS, focal_info_nce, info_nce):
        with pytest.raises(ValueError, match=r"sim must be \(N, M\)"):
            function(sim)


@pytest.mark.parametrize(("left", "right"), [((3, 4), (3, 5)), ((4,), (3, 4)), ((3, 4), (2, 3, 4))])
def test_similarity_of_unlike_shapes_is_refused(left, right):
    with pytest.raises(ValueError, match="u and v must be"):
        similarity_matrix(torch.zeros(left), torch.zeros(right))


@pytest.mark.parametrize("modulate", MODULATES)
def test_stop_gradient_keeps_the_loss(modulate):
    sim = torch.tensor(similarities(6, 11))
    flowing, stopped = (FocalInfoNCE(0.05, 0.3, modulate, x) for x in (False, True))
    assert torch.equal(loss(sim, stopped), loss(sim, flowing))
    pulls = gradient_weights(sim, stopped), gradient_weights(sim, flowing)
    assert torch.equal(*pulls) == (modulate == "none")


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


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
@pytest.mark.parametrize("weighed", [False, True])
def test_without_slopes_the_pulls_are_those_of_the_closed_form(objective, weighed):
    sim = torch.tensor(similarities(6, 11, seed=25))
    columns = Columns(GROUPS["two"], (turn(0.4, TEACHER),))
    objective = FocalWeight(objective) if weighed else objective
    twin = FocalWeight(WithoutSlopes(objective.objective)) if weighed else WithoutSlopes(objective)
    assert hasattr(objective, "slopes") and not hasattr(twin, "slopes")
    for function in FUNCTIONS:
        found, expected = function(sim, twin, columns), function(sim, objective, columns)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
        assert not found.requires_grad


@pytest.mark.parametrize("objective", [*OWN, FocalWeight(OWN[1]), FocalWeight(OWN[2])], ids=name)
@pytest.mark.parametrize("margin", [0.0, 0.4])
def test_pulls_of_a_readers_objective_are_its_gradient(objective, margin):
    sim = torch.tensor(np.clip(similarities(6, 11, seed=26), -0.99, 0.99), requires_grad=True)
    columns = Columns(GROUPS["one"][0], (turn(margin, TEACHER),) if margin else ())
    assert torch.autograd.gradcheck(lambda x: loss(x, objective, columns), [sim])
    _, autograd = by_autograd(sim, objective, columns)
    closed = gradient_weights(sim, objective, columns)
    torch.testing.assert_close(closed, autograd, rtol=1e-10, atol=1e-13)
    assert not closed.requires_grad


def test_a_row_weight_is_a_function_of_the_rows_own_probability():
    s = similarities(6, 11, seed=27)
    z = s / 0.3
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    own = np.diagonal(p)[:, None]
    sim = torch.tensor(s, requires_grad=True)
    value, autograd = by_autograd(sim, Weighed(0.3, gamma=2))
    assert value.item() == pytest.approx(np.mean(-(1 + own**2) * np.log(own)))
    # d/dl of -(1 + e^2l) l at l = log p, times dl/ds = (y - p) / tau.
    expected = (1 + own**2 + 2 * own**2 * np.log(own)) * (p - np.eye(6, 11)) / (6 * 0.3)
    np.testing.assert_allclose(autograd, expected, rtol=1e-10, atol=1e-14)
    closed = gradient_weights(sim, Weighed(0.3, gamma=2))
    np.testing.assert_allclose(closed, expected, rtol=1e-10, atol=1e-14)
    # The focal weight is one more factor, and not in the place of this one.
    both = loss(sim, FocalWeight(Weighed(0.3, gamma=2)))
    assert both.item() == pytest.approx(np.mean(-(1 - own) * (1 + own**2) * np.log(own)))


@pytest.mark.parametrize("spoiled", [lambda z: z[:, 1:], lambda z: z.sum(), lambda z: z[None]])
def test_logits_of_another_shape_are_refused(spoiled):
    @dataclass(frozen=True)
    class Spoiled(InfoNCE):
        def logits(self, sim, positives):
            return spoiled(sim)

    for function in FUNCTIONS:
        with one_line_refusal(r"Spoiled.logits gives .* for similarities of \(6, 11\)"):
            function(torch.zeros(6, 11), Spoiled())


REPEATED = {
    "none": range(11),
    "a pair": [0, 1, 2, 1, 4, 5, 6, 7, 8, 9, 10],
    "further negatives": [0, 1, 2, 3, 4, 5, 0, 0, 5, 9, 9],
    "two sentences": [0, 1] * 5 + [0],
    "one sentence": [7] * 11,
}


@pytest.mark.parametrize("ids", REPEATED.values(), ids=REPEATED)
@pytest.mark.parametrize("columns", [6, 11])
@pytest.mark.parametrize("objective", SHARP, ids=name)
def test_repeated_sentences_are_left_out(ids, columns, objective):
    sim = torch.tensor(similarities(6, columns, seed=8), requires_grad=True)
    ids = torch.tensor(ids)[:columns]
    value, by_hand = loss_and_weights(sim.detach().numpy(), objective, [ids])
    masked, autograd = by_autograd(sim, objective, Columns(ids))
    assert masked.item() == pytest.approx(value, rel=1e-12, abs=1e-12)
    np.testing.assert_allclose(autograd, by_hand, rtol=1e-10, atol=1e-12)
    closed = gradient_weights(sim, objective, Columns(ids))
    np.testing.assert_allclose(closed, by_hand, rtol=1e-10, atol=1e-12)
    repeats = (ids[:6, None] == ids) & ~torch.eye(6, columns, dtype=torch.bool)
    assert (autograd[repeats] == 0).all()
    assert (closed[repeats] == 0).all()


@pytest.mark.parametrize("objective", [*SHARP, *OWN], ids=name)
def test_a_row_without_negatives_costs_nothing(objective):
    sim = torch.tensor(similarities(4, 4, seed=9)).float().requires_grad_()
    columns = Columns(torch.zeros(4, dtype=torch.int64))
    value, gradient = by_autograd(sim, objective, columns)
    assert value == 0
    assert (gradient == 0).all()
    assert (gradient_weights(sim, objective, columns) == 0).all()


@pytest.mark.parametrize("objective", SHARP, ids=name)
def test_ids_that_all_differ_change_nothing(objective):
    sim = torch.tensor(similarities(6, 11, seed=10))
    for function in (loss, gradient_weights):
        masked = function(sim, objective, Columns(torch.arange(11).flip(0)))
        assert torch.equal(masked, function(sim, objective))


GROUPS = {
    "none": torch.arange(11)[None],
    "one": torch.tensor([[0, 1, 2, 1, 4, 5, 0, 0, 5, 9, 9]]),
    "two": torch.tensor([[0, 1, 2, 1, 4, 5, 6, 7, 8, 9, 10], [5, 6, 7, 8, 9, 5, 5, 8, 1, 2, 7]]),
}
TEACHER = torch.tensor(similarities(6, 11, seed=20))


# The hardness weight is one of the turned similarities, as `logit_and_slope` is given them.
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize(
    ("margin", "focal_weight"),
    [(0.0, False), (0.0, True), (0.05, False), (0.8, True), (1.5, False)],
)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=name)
def test_ids_margins_and_focal_weights_equal_the_formulas(groups, margin, focal_weight, objective):
    sim = torch.tensor(similarities(6, 11, seed=21), requires_grad=True)
    options = (groups.tolist(), margin, TEACHER.numpy(), focal_weight)
    expected, by_hand = loss_and_weights(sim.detach().numpy(), objective, *options)
    columns = Columns(groups, (turn(margin, TEACHER),) if margin else ())
    objective = FocalWeight(objective) if focal_weight else objective
    value, autograd = by_autograd(sim, objective, columns)
    assert value.item() == pytest.approx(expected, rel=1e-11, abs=1e-12)
    np.testing.assert_allclose(autograd, by_hand, rtol=1e-9, atol=1e-12)
    closed = gradient_weights(sim, objective, columns)
    torch.testing.assert_close(closed, autograd, rtol=1e-10, atol=1e-13)


def test_one_numbering_is_that_of_a_vector():
    sim, ids = torch.tensor(similarities(6, 11)), GROUPS["one"][0]
    for function in FUNCTIONS:
        one, vector = (function(sim, columns=Columns(x)) for x in (ids[None], ids))
        assert torch.equal(one, vector)


def test_numberings_eliminate_the_pairs_of_each():
    sim, ids = torch.tensor(similarities(6, 11)), GROUPS["two"]
    gone = [logits(sim, columns=Columns(x)) == -torch.inf for x in (ids, *ids)]
    assert torch.equal(gone[0], gone[1] | gone[2])
    assert gone[1].any() and gone[2].any() and not torch.equal(gone[1], gone[2])
    assert (gradient_weights(sim, columns=Columns(ids))[gone[0]] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_plain_loss_is_its_line_of_torch_to_the_last_bit(dtype):
    sim = torch.tensor(similarities(6, 11)).to(dtype).requires_grad_()
    target, positives = torch.arange(6), torch.eye(6, 11, dtype=torch.bool)
    focal = torch.where(positives, sim * sim, sim * (sim + 0.3)) / 0.05
    for objective, rows in (("info_nce", sim / 0.05), ("focal_info_nce", focal)):
        plain = F.cross_entropy(rows, target)
        value, gradient = by_autograd(sim, objective)
        assert torch.equal(value, plain)
        assert torch.equal(gradient, torch.autograd.grad(plain, sim)[0])
        # A margin of 0 turns nothing.
        still = Columns(turns=(turn(0.0, TEACHER),))
        assert torch.equal(loss(sim, objective, still), plain)
        pulls = [gradient_weights(sim, objective, x) for x in (still, Columns())]
        assert torch.equal(*pulls)


def test_a_margin_leaves_positives_and_near_negatives_alone():
    sim = torch.tensor([[0.2, np.cos(0.3), np.cos(0.5)], [1.0, 0.1, -1.0]])

    def seen(teacher):
        return logits(sim, InfoNCE(1.0), Columns(turns=(turn(0.4, teacher),)))

    same = torch.tensor([[True, True, False], [True, True, False]])
    assert torch.equal(seen(torch.zeros(2, 3)) == sim, same)
    expected = torch.tensor([np.cos(0.1), np.cos(np.pi - 0.4)], dtype=sim.dtype)
    torch.testing.assert_close(seen(torch.zeros(2, 3))[~same], expected)
    # Without a teacher no two sentences are alike, as for one that says 0.
    assert torch.equal(seen(None), seen(torch.zeros(2, 3)))
    # Where the teacher finds two sentences equal nothing is turned.
    assert torch.equal(seen(torch.ones(2, 3)), sim)


def test_the_hardness_weight_is_one_of_turned_similarities():
    s, t = similarities(6, 11), TEACHER.numpy()
    columns = Columns(turns=(turn(0.2, TEACHER),))
    hard, plain = (logits(torch.tensor(s), x, columns) for x in (HardnessInfoNCE(), InfoNCE()))
    expected = 9 * np.vectorize(turned)(s, 0.2, t)[0]
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(hard - plain, expected, atol=1e-12)


def test_turns_follow_each_other():
    s = np.random.default_rng(28).uniform(-0.99, 0.8, (6, 11))
    sim = torch.tensor(s, requires_grad=True)
    columns = Columns(turns=(turn(0.3, TEACHER), turn(0.2)))
    once, inner = np.vectorize(turned)(s, 0.3, TEACHER.numpy())
    twice, outer = np.vectorize(turned)(once, 0.2, 0.0)
    eye = np.eye(6, 11, dtype=bool)
    seen = logits(sim, InfoNCE(1.0), columns)
    np.testing.assert_allclose(seen.detach(), np.where(eye, s, twice), rtol=1e-10)
    (slope,) = torch.autograd.grad(seen.sum(), sim)
    np.testing.assert_allclose(slope, np.where(eye, 1, inner * outer), rtol=1e-9)
    _, autograd = by_autograd(sim, FocalInfoNCE(), columns)
    closed = gradient_weights(sim, FocalInfoNCE(), columns)
    torch.testing.assert_close(closed, autograd, rtol=1e-10, atol=1e-13)


def test_a_teacher_is_a_constant():
    sim = torch.tensor(similarities(6, 11), requires_grad=True)
    teacher = TEACHER.clone().requires_grad_()
    loss(sim, columns=Columns(turns=(turn(0.2, teacher),))).backward()
    assert teacher.grad is None
    assert sim.grad.isfinite().all()


@pytest.mark.parametrize("modulate", MODULATES)
@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("margin", [1e-6, 0.05, 1.57])
def test_a_margin_is_safe_at_the_ends_of_the_scale(modulate, stopped, margin):
    tick = torch.finfo(torch.float32).eps
    ends = torch.tensor([1.0, 1 + tick, 1 - tick / 2, 0.999])
    sim = torch.cat([ends, -ends]).repeat(8, 1).requires_grad_()
    columns = Columns(turns=(turn(margin, torch.linspace(-1, 1, 64).reshape(8, 8)),))
    objective = FocalWeight(FocalInfoNCE(0.05, 0.3, modulate, stopped))
    value, gradient = by_autograd(sim, objective, columns)
    assert value.isfinite()
    assert gradient.isfinite().all()
    closed = gradient_weights(sim, objective, columns)
    torch.testing.assert_close(closed, gradient, rtol=1e-4, atol=1e-6)


def test_focal_weight_equals_the_formula():
    s = similarities(6, 11, seed=23)
    sim = torch.tensor(s, requires_grad=True)
    value, autograd = by_autograd(sim, FocalWeight(InfoNCE(0.5)))
    p = np.exp(s / 0.5) / np.exp(s / 0.5).sum(axis=1, keepdims=True)
    own = np.diagonal(p)[:, None]
    assert value.item() == pytest.approx(np.mean(-(1 - own) * np.log(own)))
    assert value < loss(sim, InfoNCE(0.5))
    expected = ((1 - own) - own * np.log(own)) * (p - np.eye(6, 11)) / (6 * 0.5)
    np.testing.assert_allclose(autograd, expected, rtol=1e-10, atol=1e-14)
    closed = gradient_weights(sim, FocalWeight(InfoNCE(0.5)))
    np.testing.assert_allclose(closed, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("positive", [1.0, -1.0])
def test_focal_weight_is_stable_where_a_row_is_solved_or_lost(positive):
    sim = torch.full((8, 8), -positive).fill_diagonal_(positive).requires_grad_()
    value, gradient = by_autograd(sim, FocalWeight(InfoNCE(0.005)))
    closed = gradient_weights(sim, FocalWeight(InfoNCE(0.005)))
    if positive == 1:  # p is 1
        assert value == 0
        assert (gradient == 0).all() and (closed == 0).all()
    else:  # p underflows, the weight is 1
        plain, expected = by_autograd(sim, InfoNCE(0.005))
        torch.testing.assert_close(value, plain)
        torch.testing.assert_close(gradient, expected)
        torch.testing.assert_close(closed, gradient)


@pytest.mark.parametrize("modulate", MODULATES)
def test_gradcheck_of_ids_margin_and_focal_weight(modulate):
    s = np.random.default_rng(24).uniform(-0.9, 0.9, (4, 6))
    sim = torch.tensor(s, requires_grad=True)
    columns = Columns(GROUPS["two"][:, :6], (turn(0.3, TEACHER[:4, :6]),))
    objective = FocalWeight(FocalInfoNCE(0.2, 0.3, modulate))
    assert torch.autograd.gradcheck(lambda x: loss(x, objective, columns), [sim])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_margin_and_focal_weight_take_half_precision_in_float32(dtype):
    half, teacher = (torch.tensor(similarities(6, 11, seed=n)).to(dtype) for n in (5, 6))
    narrow, full = (Columns(turns=(turn(0.1, x),)) for x in (teacher, teacher.float()))
    objective = FocalWeight(FocalInfoNCE())
    for function in FUNCTIONS:
        result = function(half, objective, narrow)
        assert result.dtype == torch.float32
        assert torch.equal(result, function(half.float(), objective, full))
    assert loss(half.double(), objective, narrow).dtype == torch.float64


@pytest.mark.parametrize("margin", [-0.1, np.pi / 2, float("nan"), float("inf")])
def test_bad_margin_is_refused(margin):
    with one_line_refusal("margin must be"):
        turn(margin, torch.eye(3))


def test_a_teacher_of_another_shape_is_refused():
    for teacher in (torch.eye(4), torch.eye(2), lambda first, size: torch.zeros(size, 4)):
        for function in FUNCTIONS:
            with pytest.raises(ValueError, match="teacher must hold"):
                function(torch.eye(3), columns=Columns(turns=(turn(0.1, teacher),)))


@pytest.mark.parametrize("shape", [(6,), (12,), (11, 1), (), (2, 6), (2, 12), (1, 2, 11)])
def test_numberings_that_are_not_one_a_column_are_refused(shape):
    sim, ids = torch.zeros(6, 11), torch.zeros(shape, dtype=torch.int64)
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match=r"sentence_ids must be \(11,\), .* or \(G, 11\)"):
            function(sim, columns=Columns(ids))
