"""The mixed pairs of Core-tuning and their loss, against the formulas written out in float64."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from formulas import logit_and_slope, turned

from fcse.config import TrainConfig
from fcse.encoder import SentenceEncoder
from fcse.losses import Columns, Own, chunked_loss, loss, repeats, similarity_matrix
from fcse.methods import Batch, Sentences, Start
from fcse.methods.adap_acse import AdapACSE, turn
from fcse.methods.core_tuning import (
    MIN_NEGATIVE_WEIGHT,
    CoreTuning,
    FocalWeight,
    among_mixtures,
    draws,
    mixed_pairs,
)
from fcse.objectives import FocalInfoNCE, HardnessInfoNCE, InfoNCE, name
from fcse.training.batches import compare, loss_of

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
    wholly, _ = mixed_pairs(u, v, torch.zeros(5), shares, DRAWN)
    torch.testing.assert_close((anchors * wholly).sum(1), hardest)


def test_a_row_without_a_true_negative_keeps_its_positive():
    u, v, *weights = batch()
    positive, _ = mixed_pairs(u, v, *weights, DRAWN, ONE_SENTENCE)
    torch.testing.assert_close(positive, torch.nn.functional.normalize(v[:5], dim=1))
    alone, _ = mixed_pairs(u[:1], v[:1], *torch.full((2, 1), 0.3), torch.tensor([0]))
    torch.testing.assert_close(alone, torch.nn.functional.normalize(v[:1], dim=1))


def test_a_low_negative_weight_is_raised():
    u, v, positive_weight, _ = batch()
    shares = torch.tensor([[0.1], [MIN_NEGATIVE_WEIGHT], [0.9]]).expand(3, 5)
    low, least, more = (mixed_pairs(u, v, positive_weight, x, DRAWN)[1] for x in shares)
    assert torch.equal(low, least)
    assert not torch.equal(least, more)


KINDS = [
    InfoNCE(),
    FocalInfoNCE(0.2, 0.1),
    FocalInfoNCE(modulate="negative", stop_gradient=True),
    HardnessInfoNCE(alpha=3.0),
]


def core_tuning(u, v, weights, drawn, objective, ids=None, margin=0.0, teacher=None, size=None):
    """The mean of the usual loss and of that with harder positives, a harder negative in both."""
    ids = torch.arange(len(v)) if ids is None else ids
    positive, negative = mixed_pairs(u, v, *weights, drawn, ids)
    numbers = ids[..., drawn]
    turns = ()
    if margin:
        # A harder negative has the teacher's similarity of the sentence that was drawn.
        turns = (turn(margin, torch.cat([teacher, teacher.gather(1, drawn[:, None])], dim=1)),)
    usual, harder = (
        chunked_loss(u, v, objective, Columns(ids, turns), own, size)
        for own in (Own(negative, numbers), Own(negative, numbers, positive))
    )
    return (usual + harder) / 2


def by_hand(u, v, weights, drawn, ids, objective, margin, teacher):
    """Both losses entry by entry, over the candidates that a row is left with."""
    weighed = isinstance(objective, FocalWeight)
    objective = objective.objective if weighed else objective

    def negative(s, t):  # the hardness weight is one of the turned similarity
        return logit_and_slope(objective, turned(s, margin, t)[0] if margin else s, False)[0]

    positives, negatives = pairs_by_hand(u, v, *weights, drawn, ids)
    total = 0.0
    for i, a in enumerate(u):
        a = unit(a)
        true = [j for j in range(len(v)) if j != i and not any(x[i] == x[j] for x in ids)]
        row = [negative(a @ unit(v[j]), teacher[i, j]) for j in true]
        if drawn[i] in true:
            row.append(negative(a @ negatives[i], teacher[i, drawn[i]]))
        for positive in (unit(v[i]), positives[i]):
            own = logit_and_slope(objective, a @ positive, True)[0]
            p = 1 / (1 + sum(np.exp(x - own) for x in row))
            total -= (1 - p if weighed else 1) * np.log(p)
    return total / (2 * len(u))


@pytest.mark.parametrize("objective", [*KINDS, *map(FocalWeight, KINDS)], ids=name)
@pytest.mark.parametrize("ids", [None, IDS[0], IDS, ONE_SENTENCE], ids=str)
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_core_tuning_equals_the_formula(objective, ids, margin):
    u, v, *weights = batch()
    generator = torch.Generator().manual_seed(3)
    pair = (torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (5, 8))
    teacher = similarity_matrix(*pair)
    rows = [] if ids is None else ids.reshape(-1, 8).tolist()
    arrays = numpy_of(u, v, torch.stack(weights), DRAWN)
    expected = by_hand(*arrays, rows, objective, margin, teacher.numpy())
    for size in (None, 2):
        value = core_tuning(u, v, weights, DRAWN, objective, ids, margin, teacher, size)
        assert value.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("objective", [*KINDS, *map(FocalWeight, KINDS)], ids=name)
@pytest.mark.parametrize("ids", [None, IDS], ids=str)
def test_a_positive_weight_of_one_mixes_nothing_in(objective, ids):
    u, v, _, negative_weight = batch()
    positive, _ = mixed_pairs(u, v, torch.ones(5), negative_weight, DRAWN, ids)
    mixed = chunked_loss(u, v, objective, Columns(ids), Own(positive=positive))
    plain = loss(similarity_matrix(u, v), objective, Columns(ids))
    torch.testing.assert_close(mixed, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(mixed, (u, v)),
        torch.autograd.grad(plain, (u, v)),
        rtol=1e-9,
        atol=1e-11,
    )


# What is taken as a constant moves the value and not the gradient: those are left out.
@pytest.mark.parametrize("objective", [*KINDS[:2], *map(FocalWeight, KINDS[:2])], ids=name)
def test_gradcheck(objective):
    u, v, *weights = batch(seed=1)
    assert torch.autograd.gradcheck(
        lambda a, b: core_tuning(a, b, weights, DRAWN, objective, IDS), [u, v]
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
    objective = FocalWeight(FocalInfoNCE())
    value = core_tuning(u, v, weights, DRAWN, objective)
    full = core_tuning(u.float(), v.float(), weights, DRAWN, objective)
    assert value.dtype == torch.float32
    assert torch.equal(value, full)
    assert all(x.dtype == torch.float32 for x in mixed_pairs(u, v, *weights, DRAWN))
    value.backward()
    assert u.grad.dtype == dtype
    assert u.grad.isfinite().all() and v.grad.isfinite().all()


def test_autocast_changes_nothing():
    u, v, *weights = batch(dtype=torch.float32)
    outside = core_tuning(u, v, weights, DRAWN, FocalInfoNCE())
    with torch.autocast("cpu", torch.bfloat16):
        assert (u @ v.T).dtype == torch.bfloat16
        assert torch.equal(core_tuning(u, v, weights, DRAWN, FocalInfoNCE()), outside)


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"positive_weight": torch.ones(4)}, "weights and columns"),
        ({"positive_weight": torch.ones(5, 1)}, "weights and columns"),
        ({"negative_weight": torch.ones(8)}, "weights and columns"),
        ({"negative_columns": DRAWN[:4]}, "weights and columns"),
        ({"sentence_ids": torch.zeros(5, dtype=torch.int64)}, "sentence_ids must be"),
        ({"sentence_ids": torch.zeros(1, 2, 8, dtype=torch.int64)}, "sentence_ids must be"),
        ({"sentence_ids": torch.tensor(0)}, "sentence_ids must be"),
    ],
)
def test_bad_arguments_are_refused(argument, match):
    u, v, *weights = batch()
    known = {"positive_weight": weights[0], "negative_weight": weights[1]}
    with pytest.raises(ValueError, match=match):
        mixed_pairs(u, v, **{**known, "negative_columns": DRAWN, **argument})
    with pytest.raises(ValueError, match="v must have a row"):
        mixed_pairs(v, u, *weights, DRAWN)
    with pytest.raises(ValueError, match="u and v must be"):
        mixed_pairs(u, v[:, :3], *weights, DRAWN)


def test_draws_depend_on_seed_and_step_and_never_take_a_rows_own():
    shares = []
    for step in range(1, 40):
        lam, other, columns = draws(3, step, 50)
        again = draws(3, step, 50)
        assert all(torch.equal(a, b) for a, b in zip((lam, other, columns), again, strict=True))
        assert (columns != torch.arange(50)).all()
        assert columns.min() >= 0 and columns.max() < 50
        shares += [lam, other]
    # Beta(1, 1) is uniform; five standard deviations of a mean either way.
    flat = torch.cat(shares)
    assert flat.min() >= 0 and flat.max() <= 1
    assert abs(flat.mean() - 1 / 2) < 5 * (1 / 12 / len(flat)) ** 0.5
    assert len({tuple(x.tolist()) for x in shares}) == len(shares)
    assert not torch.equal(draws(4, 1, 50)[0], shares[0])
    # Of two sentences each draws the other.
    assert draws(0, 1, 2)[2].tolist() == [1, 0]


@pytest.mark.parametrize("settings", [CoreTuning(), CoreTuning(focal_weight=False)], ids=name)
@pytest.mark.parametrize("alike", [False, True], ids=["no repeats", "repeats and labels"])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_the_loss_of_a_step_is_the_formula(settings, alike, margin, tiny_model, sentences):
    u, v, *_ = batch(seed=4)
    v = v[:5]
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"))
    start = Start(TrainConfig(seed=2), encoder, None)
    on = [AdapACSE(margin, tiny_model("roberta"))] if margin else []
    acting = [method.begin(start) for method in (*on, settings)]
    texts = sentences[:5]
    groups = [[0, 1, 2, 1, 4], [5, 6, 7, 8, 5]] if alike else [[0, 1, 2, 3, 4]]
    ids, *labels = map(torch.tensor, groups)
    step = Batch(5, 5, Sentences(np.arange(5), texts, [()] * 5), ids=ids, labels=tuple(labels))
    for method in acting:
        method.receive(step)
    teacher = np.zeros((5, 5))
    if margin:
        known = SentenceEncoder.from_pretrained(tiny_model("roberta"), "mean").encode(texts)
        teacher = np.array([[unit(a) @ unit(b) for b in known] for a in known])
    found = loss_of(FocalInfoNCE(0.2), acting, nullcontext(), compare(step, 0, u, v))
    *weights, drawn = draws(2, 5, 5)
    assert drawn[1] == 3 and drawn[4] == 0  # left out where those are repeats, or of one label
    arrays = numpy_of(u, v, torch.stack(weights), drawn)
    objective = FocalWeight(FocalInfoNCE(0.2)) if settings.focal_weight else FocalInfoNCE(0.2)
    expected = by_hand(*arrays, groups, objective, margin, teacher)
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("weigh", [FocalWeight, lambda x: FocalWeight(FocalWeight(x))])
def test_a_schedule_behind_the_weight_reaches_the_objective(weigh):
    weighed = weigh(FocalInfoNCE(0.05, 0.3))
    assert weighed.temperature == 0.05
    assert replace(weighed, temperature=0.1) == weigh(FocalInfoNCE(0.1, 0.3))


def as_the_code_has_it(u, v, ids, lam, other, partners, temperature):
    """The authors' order of operations in NumPy: their `feature_mixup` and `focal_SupConLoss`.

    Returns: the loss, and its gradient by each mixture, (4 n, D), the positives behind."""
    n = len(u)
    features, both = np.concatenate([u, v]), np.concatenate([ids, ids])
    unit_features = np.array([unit(x) for x in features])
    similarity = unit_features @ unit_features.T
    view = (np.arange(2 * n) + n) % (2 * n)
    partners = np.where(partners == view, (partners + 1) % (2 * n), partners)
    other = np.maximum(other, 0.8)
    mixed = [(1 - a) * features[i] + a * features[partners[i]] for i, a in enumerate(other)]
    for i, a in enumerate(lam):
        hardest = np.where(both == both[i], -np.inf, similarity[i]).argmax()
        mixed.append(a * features[view[i]] + (1 - a) * features[hardest])
    candidates = np.array([unit(x) for x in (*features, *mixed)])
    logits = candidates[: 2 * n] @ candidates.T / temperature
    for i in range(2 * n):
        left_out = (both == both[i]) & (np.arange(2 * n) != view[i])
        logits[i, : 2 * n][left_out] = -np.inf  # itself, as theirs, and repeats, as everywhere here
    log_p = logits[np.arange(2 * n), view] - np.log(np.exp(logits).sum(1))
    return (-(1 - np.exp(log_p)) * log_p).mean()


@pytest.mark.parametrize("alike", [False, True], ids=["no repeats", "repeats"])
def test_the_way_of_the_code_is_their_order_of_operations(alike, tiny_model, sentences):
    n = 5
    u, v, *_ = batch(seed=6)
    u, v = u[:n].clone().requires_grad_(), v[:n].clone().requires_grad_()
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"))
    settings = CoreTuning(way="code")
    acting = [settings.begin(Start(TrainConfig(seed=2), encoder, None))]
    ids = torch.tensor([0, 1, 2, 1, 4] if alike else range(n))
    step = Batch(5, n, Sentences(np.arange(n), sentences[:n], [()] * n), ids=ids)
    found = loss_of(InfoNCE(0.2), acting, nullcontext(), compare(step, 0, u, v))
    weights = draws(2, 5, 2 * n)
    lam, other, partners = (x.double().numpy() for x in weights)
    arrays = (u.detach().numpy(), v.detach().numpy(), ids.numpy())
    expected = as_the_code_has_it(*arrays, lam, other, partners.astype(int), 0.07)
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_in_the_way_of_the_code_the_encoder_learns_through_mixtures_alone(tiny_model, sentences):
    n = 5
    u, v, *_ = batch(seed=6)
    u, v = u[:n].clone().requires_grad_(), v[:n].clone().requires_grad_()
    step = Batch(5, n, Sentences(np.arange(n), sentences[:n], [()] * n), ids=torch.arange(n))
    compared = compare(step, 0, u, v)
    many = among_mixtures(compared, *draws(2, 5, 2 * n))
    assert not many.u.requires_grad
    plain, mixed = many.v[: 2 * n].sum(), many.v[2 * n :].square().sum()
    assert not torch.autograd.grad(plain, u, retain_graph=True)[0].any()
    assert torch.autograd.grad(mixed, u)[0].any()
    assert len(many.v) == 6 * n
    ids = many.numbers()
    left_out = repeats(ids, 2 * n, 6 * n)
    assert left_out.sum() == 2 * n  # of every anchor itself, and no mixture
