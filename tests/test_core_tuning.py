"""The mixed pairs of Core-tuning and their loss, against the formulas written out in float64."""

import numpy as np
import pytest
import torch

from fcse.losses import (
    MIN_NEGATIVE_WEIGHT,
    core_tuning,
    loss,
    mixed_pairs,
    similarity_matrix,
)

IDS = torch.tensor([[0, 1, 2, 3, 0, 5, 5, 7], [0, 1, 1, 3, 4, 2, 6, 3]])
ONE_SENTENCE = torch.zeros(8, dtype=torch.int64)
DRAWN = torch.tensor([1, 2, 7, 3, 0])  # 4 draws a repeat of its own sentence, 3 itself


def batch(seed=0, dtype=torch.float64):
    """Five anchors, eight columns, and shares of both kinds."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(8, 6, dtype=torch.float64, generator=generator)
    u = v[:5] + torch.randn(5, 6, dtype=torch.float64, generator=generator)
    weights = torch.rand(2, 5, dtype=torch.float64, generator=generator)
    return u.to(dtype).requires_grad_(), v.to(dtype).requires_grad_(), *weights


def unit(x):
    return x / np.linalg.norm(x)


def pairs_by_hand(u, v, positive_weight, negative_weight, drawn, ids):
    positives, negatives = [], []
    for i, a in enumerate(u):
        true = [j for j in range(len(v)) if j != i and not any(x[i] == x[j] for x in ids)]
        hardest = max(true, key=lambda j, a=a: unit(a) @ unit(v[j]), default=i)
        lam = positive_weight[i]
        positives.append(unit(lam * unit(v[i]) + (1 - lam) * unit(v[hardest])))
        lam = max(0.8, negative_weight[i])
        negatives.append(unit(lam * unit(v[drawn[i]]) + (1 - lam) * unit(a)))
    return np.array(positives), np.array(negatives)


def numpy_of(*tensors):
    return [x.detach().numpy() for x in tensors]


@pytest.mark.parametrize("ids", [None, IDS[0], IDS, ONE_SENTENCE], ids=str)
def test_mixed_pairs_equal_the_formulas(ids):
    u, v, *weights = batch()
    positive, negative = mixed_pairs(u, v, *weights, DRAWN, ids)
    rows = [] if ids is None else ids.reshape(-1, 8).tolist()
    expected = pairs_by_hand(*numpy_of(u, v, *weights, DRAWN), rows)
    np.testing.assert_allclose(positive.detach().numpy(), expected[0], atol=1e-12)
    np.testing.assert_allclose(negative.detach().numpy(), expected[1], atol=1e-12)


def test_mixed_pairs_are_harder():
    u, v, positive_weight, _ = batch()
    shares = torch.full((5,), MIN_NEGATIVE_WEIGHT)
    _, negative = mixed_pairs(u, v, positive_weight, shares, torch.arange(5) + 1)
    anchors = torch.nn.functional.normalize(u, dim=1)
    sim = similarity_matrix(u, v)
    assert ((anchors * negative).sum(1) > sim.diagonal(1)[:5]).all()
    hardest = sim.masked_fill(torch.eye(5, 8, dtype=torch.bool), -2).amax(dim=1)
    wholly, _ = mixed_pairs(u, v, 0.0)
    torch.testing.assert_close((anchors * wholly).sum(1), hardest)


def test_a_row_without_a_true_negative_keeps_its_positive():
    u, v, positive_weight, _ = batch()
    positive, negative = mixed_pairs(u, v, positive_weight, sentence_ids=ONE_SENTENCE)
    torch.testing.assert_close(positive, torch.nn.functional.normalize(v[:5], dim=1))
    assert negative is None
    alone, _ = mixed_pairs(u[:1], v[:1], 0.3)
    torch.testing.assert_close(alone, torch.nn.functional.normalize(v[:1], dim=1))


def test_a_low_negative_weight_is_raised():
    u, v, _, _ = batch()
    low, least = (mixed_pairs(u, v, 1.0, x, DRAWN)[1] for x in (0.1, MIN_NEGATIVE_WEIGHT))
    assert torch.equal(low, least)
    assert not torch.equal(least, mixed_pairs(u, v, 1.0, 0.9, DRAWN)[1])


OPTIONS = {
    "info_nce": {"objective": "info_nce"},
    "focal": {"temperature": 0.2, "m": 0.1},
    "stopped": {"modulate": "negative", "stop_gradient": True},
    "hardness": {"objective": "hardness_info_nce", "alpha": 3.0},
    "focal weight": {"objective": "info_nce", "temperature": 0.3, "focal_weight": True},
}


def by_hand(u, v, weights, drawn, ids, options, margin=0.0, teacher=None):
    """Both losses entry by entry, over the candidates that a row is left with."""
    arguments = {"objective": "focal_info_nce", "temperature": 0.05, "m": 0.3, "alpha": 9.0}
    arguments |= {"modulate": "both", "focal_weight": False, **options}
    objective, modulate = arguments["objective"], arguments["modulate"]
    focal, hard = objective == "focal_info_nce", objective == "hardness_info_nce"

    def negative(s, t):
        x = s
        if margin and np.arccos(s) > margin:
            x = np.cos(np.arccos(s) - (1 - t) * margin)
        factor = x + arguments["m"] if focal and modulate in ("both", "negative") else 1
        return x * factor / arguments["temperature"] + (arguments["alpha"] * s if hard else 0)

    positives, negatives = pairs_by_hand(u, v, *weights, drawn, ids)
    total = 0.0
    for i, a in enumerate(u):
        a = unit(a)
        true = [j for j in range(len(v)) if j != i and not any(x[i] == x[j] for x in ids)]
        t = np.zeros(len(v)) if teacher is None else teacher[i]
        row = [negative(a @ unit(v[j]), t[j]) for j in true]
        if drawn[i] in true:
            row.append(negative(a @ negatives[i], t[drawn[i]]))
        for positive in (unit(v[i]), positives[i]):
            s = a @ positive
            own = s * (s if focal and modulate in ("both", "positive") else 1)
            own /= arguments["temperature"]
            p = 1 / (1 + sum(np.exp(x - own) for x in row))
            total -= (1 - p if arguments["focal_weight"] else 1) * np.log(p)
    return total / (2 * len(u))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("ids", [None, IDS[0], IDS, ONE_SENTENCE], ids=str)
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_core_tuning_equals_the_formula(options, ids, margin):
    u, v, *weights = batch()
    generator = torch.Generator().manual_seed(3)
    pair = tuple(torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (5, 8))
    value = core_tuning(
        u, v, *weights, DRAWN, sentence_ids=ids, margin=margin, teacher=pair, **options
    )
    rows = [] if ids is None else ids.reshape(-1, 8).tolist()
    arrays = numpy_of(u, v, torch.stack(weights), DRAWN)
    expected = by_hand(*arrays, rows, options, margin, similarity_matrix(*pair).numpy())
    assert value.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("ids", [None, IDS], ids=str)
@pytest.mark.parametrize("weight", [1.0, torch.ones(5)], ids=str)
def test_without_mixing_it_is_the_loss(options, ids, weight):
    u, v, _, _ = batch()
    options = {**options, "sentence_ids": ids}
    mixed = core_tuning(u, v, weight, None, **options)
    plain = loss(similarity_matrix(u, v), **options)
    torch.testing.assert_close(mixed, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(mixed, (u, v)),
        torch.autograd.grad(plain, (u, v)),
        rtol=1e-9,
        atol=1e-11,
    )


# What is taken as a constant moves the value and not the gradient: those are left out.
@pytest.mark.parametrize("name", ["info_nce", "focal", "focal weight"])
def test_gradcheck(name):
    u, v, *weights = batch(seed=1)
    assert torch.autograd.gradcheck(
        lambda a, b: core_tuning(a, b, *weights, DRAWN, sentence_ids=IDS, **OPTIONS[name]), [u, v]
    )


def test_gradients_reach_what_was_mixed_in():
    u, v, *weights = batch()
    positive, negative = mixed_pairs(u, v, *weights, DRAWN)
    du, dv = torch.autograd.grad(positive[0].sum() + negative[0].sum(), (u, v))
    assert (du[0] != 0).any() and (du[1:] == 0).all()
    hardest = similarity_matrix(u, v)[0, 1:].argmax() + 1
    assert all((dv[j] != 0).any() for j in (0, hardest, DRAWN[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    u, v, *weights = batch(dtype=dtype)
    value = core_tuning(u, v, *weights, DRAWN, focal_weight=True)
    full = core_tuning(u.float(), v.float(), *weights, DRAWN, focal_weight=True)
    assert value.dtype == torch.float32
    assert torch.equal(value, full)
    assert all(x.dtype == torch.float32 for x in mixed_pairs(u, v, *weights, DRAWN))
    value.backward()
    assert u.grad.dtype == dtype
    assert u.grad.isfinite().all() and v.grad.isfinite().all()


def test_autocast_changes_nothing():
    u, v, *weights = batch(dtype=torch.float32)
    outside = core_tuning(u, v, *weights, DRAWN)
    with torch.autocast("cpu", torch.bfloat16):
        assert (u @ v.T).dtype == torch.bfloat16
        assert torch.equal(core_tuning(u, v, *weights, DRAWN), outside)


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"positive_weight": torch.ones(4)}, "mixing weight"),
        ({"positive_weight": torch.ones(5, 1)}, "mixing weight"),
        ({"negative_weight": torch.ones(8), "negative_columns": DRAWN}, "mixing weight"),
        ({"negative_weight": 0.9}, "needs negative_columns"),
        ({"negative_weight": 0.9, "negative_columns": DRAWN[:4]}, "needs negative_columns"),
        ({"sentence_ids": torch.zeros(5, dtype=torch.int64)}, "sentence_ids must be"),
    ],
)
def test_bad_arguments_are_refused(argument, match):
    u, v, _, _ = batch()
    for function in (mixed_pairs, core_tuning):
        with pytest.raises(ValueError, match=match):
            function(u, v, **argument)
        with pytest.raises(ValueError, match="v must have a row"):
            function(v, u)
        with pytest.raises(ValueError, match="u and v must be"):
            function(u, v[:, :3])


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"objective": "triplet"}, "objective 'triplet'"),
        ({"temperature": 0.0}, "temperature"),
        ({"margin": -0.1}, "margin must be"),
        ({"margin": 0.1}, "needs a teacher"),
        ({"margin": 0.1, "teacher": (torch.eye(5), torch.eye(5))}, "teacher must hold"),
    ],
)
def test_bad_parameters_are_refused(argument, match):
    u, v, _, _ = batch()
    with pytest.raises(ValueError, match=match):
        core_tuning(u, v, **argument)
