"""The loss in chunks of rows against the loss of the whole matrix, and what it allocates."""

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from formulas import OBJECTIVES, OWN, SHARP, WithoutSlopes, kinds
from torch.utils._python_dispatch import TorchDispatchMode

from fcse.losses import (
    NOTHING,
    PLAIN,
    Columns,
    Own,
    chunked_loss,
    gradient_weights,
    logits,
    loss,
    similarity_matrix,
)
from fcse.methods.adap_acse import turn
from fcse.methods.core_tuning import FocalWeight
from fcse.objectives import FocalInfoNCE, name

FUNCTIONS = (logits, loss, gradient_weights)
WEIGHED = [FocalWeight(x) for x in (*OBJECTIVES, *OWN)]
FEW_WEIGHED = [FocalWeight(x) for x in (FocalInfoNCE(0.2), *OWN)]


def embeddings(rows, columns, seed=0, dtype=torch.float64):
    """Views of a few sentences with a zero vector and an opposite pair, and ids with repeats."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(columns, 6, dtype=torch.float64, generator=generator)
    u = v[:rows] + torch.randn(rows, 6, dtype=torch.float64, generator=generator)
    u[-1] = -v[rows - 1]
    v[columns // 2] = 0
    ids = torch.randint(max(2, columns // 2), (columns,), generator=generator)
    return u.to(dtype).requires_grad_(), v.to(dtype).requires_grad_(), ids


def numberings(columns, seed=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(max(2, columns // 2), (2, columns), generator=generator)


def teacher(rows, columns, seed=5, dtype=torch.float64):
    """A teacher's similarities of blocks of rows, and all of them."""
    generator = torch.Generator().manual_seed(seed)
    anchors, others = (
        torch.randn(n, 3, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for n in (rows, columns)
    )

    def blocks(first, size):
        return similarity_matrix(anchors[first : first + size], others)

    return blocks, blocks(0, rows)


def value_and_gradients(function, inputs, scale=1.0):
    value = function(*inputs)
    return (value, *torch.autograd.grad(scale * value, inputs))


def compare(u, v, objective, columns, whole=None, sizes=(1, 3, 7, 50, None), **tolerance):
    """Chunks against `loss`; `whole` has the teacher of `columns` as a matrix."""
    tolerance = tolerance or {"rtol": 1e-9, "atol": 1e-11}
    expected = value_and_gradients(
        lambda a, b: loss(similarity_matrix(a, b), objective, whole or columns), (u, v), 2.5
    )
    for size in sizes:
        chunked = value_and_gradients(
            lambda a, b, n=size: chunked_loss(a, b, objective, columns, chunk_size=n), (u, v), 2.5
        )
        torch.testing.assert_close(chunked, expected, **tolerance)


@pytest.mark.parametrize("objective", [*SHARP, *kinds(0.5, -0.2), *OWN], ids=name)
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 7), (7, 12)])
def test_chunks_equal_the_whole(objective, repeats, rows, columns):
    u, v, ids = embeddings(rows, columns)
    compare(u, v, objective, Columns(ids if repeats else None))


@pytest.mark.parametrize("objective", [*SHARP, *OWN], ids=name)
def test_chunks_equal_the_whole_in_float32(objective):
    u, v, ids = embeddings(40, 53, dtype=torch.float32)
    compare(u, v, objective, Columns(ids), sizes=[9], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("objective", [*OBJECTIVES, *OWN, *WEIGHED], ids=name)
@pytest.mark.parametrize("margin", [0.0, 0.4])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 7), (7, 12)])
def test_chunks_with_margin_and_numberings_equal_the_whole(objective, margin, rows, columns):
    u, v, _ = embeddings(rows, columns)
    ids = numberings(columns)
    by_block, whole = (
        Columns(ids, (turn(margin, x),) if margin else ()) for x in teacher(rows, columns)
    )
    compare(u, v, objective, by_block, whole, (1, 3, None))


@pytest.mark.parametrize("objective", [*OBJECTIVES, *OWN, *FEW_WEIGHED], ids=name)
@pytest.mark.parametrize("margin", [0.0, 0.4])
def test_blocks_of_rows_are_those_of_the_matrix(objective, margin):
    u, v, _ = embeddings(7, 12)
    sim = similarity_matrix(u, v).detach()
    columns = Columns(numberings(12), tuple(turn(margin, x) for x in teacher(7, 12)) * bool(margin))
    for function in FUNCTIONS:
        whole = function(sim, objective, columns)
        parts = []
        for a, b in ((0, 3), (3, 6), (6, 7)):
            share = 1 if function is logits else (b - a) / 7
            parts.append(share * function(sim[a:b], objective, replace(columns, first=a)))
        torch.testing.assert_close(sum(parts) if function is loss else torch.cat(parts), whole)


def test_a_margin_of_0_and_one_numbering_change_no_bit():
    u, v, ids = embeddings(7, 12, dtype=torch.float32)
    default, other = (
        value_and_gradients(lambda a, b, c=c: chunked_loss(a, b, columns=c), (u, v))
        for c in (Columns(ids), Columns(ids[None], (turn(0.0, teacher(7, 12)[0]),)))
    )
    assert all(torch.equal(a, b) for a, b in zip(other, default, strict=True))


@pytest.mark.parametrize("objective", [FocalInfoNCE(), *FEW_WEIGHED], ids=name)
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_gradcheck(objective, margin):
    u, v, _ = embeddings(5, 8, seed=1)
    v.data[4] = 1.0  # a zero vector has no derivative
    columns = Columns(numberings(8), (turn(margin, teacher(5, 8)[0]),) if margin else ())
    assert torch.autograd.gradcheck(
        lambda a, b: chunked_loss(a, b, objective, columns, chunk_size=2), [u, v]
    )


def mixtures(rows, seed=7, dtype=torch.float64):
    """A vector of its own for each anchor, in the place of a negative and of its positive."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(2, rows, 6, dtype=torch.float64, generator=generator).to(dtype)
    return [x.clone().requires_grad_() for x in made]


def plainly(u, v, objective, columns, own):
    """The loss over the whole matrix with a column more, each step written out for autograd."""
    unit = [x if x is None else F.normalize(x, dim=1) for x in (u, v, own.negative, own.positive)]
    u, v, negative, positive = unit
    sim = u @ v.T
    target = torch.eye(*sim.shape, dtype=torch.bool)
    false = torch.zeros_like(target)
    if columns.sentence_ids is not None:
        for ids in columns.sentence_ids.reshape(-1, len(v)):
            false |= (ids[: len(u), None] == ids) & ~target
    if positive is not None:
        sim = sim.where(~target, (u * positive).sum(dim=1, keepdim=True))
    if negative is not None:
        sim = torch.cat([sim, (u * negative).sum(dim=1, keepdim=True)], dim=1)
        drawn = torch.zeros(len(u), dtype=torch.bool)
        if own.negative_ids is not None:
            pairs = zip(
                own.negative_ids.reshape(-1, len(u)),
                columns.sentence_ids.reshape(-1, len(v)),
                strict=True,
            )
            for theirs, ids in pairs:
                drawn |= theirs == ids[: len(u)]
        false = torch.cat([false, drawn[:, None]], dim=1)
        target = F.pad(target, (0, 1))
    for each in columns.turns:
        sim, _ = each(sim, target, 0)
    log_p = objective.logits(sim, target).masked_fill(false, -torch.inf).log_softmax(dim=1)
    own_log_p = log_p[target]
    weight = getattr(objective, "row_weight", lambda x: 1)(own_log_p)
    return -(weight * own_log_p).mean()


@pytest.mark.parametrize("objective", [*OBJECTIVES, *OWN, *FEW_WEIGHED], ids=name)
@pytest.mark.parametrize("margin", [0.0, 0.4])
@pytest.mark.parametrize("ids", [None, "vector", "numberings"])
@pytest.mark.parametrize("given", [("negative",), ("positive",), ("negative", "positive")], ids=str)
def test_own_vectors_equal_the_whole_matrix_with_a_column_more(objective, margin, ids, given):
    u, v, _ = embeddings(7, 12)
    vectors = dict(zip(("negative", "positive"), mixtures(7), strict=True))
    vectors = {name: vectors[name] for name in given}
    ids = {None: None, "vector": numberings(12)[0], "numberings": numberings(12)}[ids]
    by_block, whole = (
        Columns(ids, (turn(margin, x),) if margin else ())
        for x in teacher(7, 12 + ("negative" in given))
    )
    # Its own sentence, and what is that by either numbering, by both and by none.
    drawn = torch.tensor([2, 2, 8, 3, 9, 1, 0])
    either = (numberings(12)[:, drawn] == numberings(12)[:, :7]).int()
    assert either.tolist() == [[0, 1, 0, 1, 0, 1, 0], [1, 0, 0, 1, 1, 1, 0]]
    numbered = ids is not None and "negative" in given
    inputs = (u, v, *vectors.values())
    for negative_ids in (None, ids[..., drawn]) if numbered else (None,):
        owned = partial(Own, negative_ids=negative_ids)

        def value(function, columns, *others, owned=owned):
            def of(a, b, *made):
                own = owned(**dict(zip(given, made, strict=True)))
                return function(a, b, objective, columns, own, *others)

            return value_and_gradients(of, inputs, 2.5)

        expected = value(plainly, whole)
        for size in (1, 3, None):
            found = value(chunked_loss, by_block, size)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_negative_of_the_anchors_own_sentence_is_left_out_of_its_row():
    u, v, _ = embeddings(3, 5)
    negative, _ = mixtures(3)
    columns = Columns(torch.arange(5))

    def value(numbers):
        return chunked_loss(u, v, "info_nce", columns, Own(negative, torch.tensor(numbers)))

    def rows(z):
        return -z.log_softmax(dim=1).diagonal()

    sim = similarity_matrix(u, v)
    more = torch.cat([sim, similarity_matrix(u, negative).diagonal()[:, None]], dim=1)
    without, with_it = rows(sim / 0.05), rows(more / 0.05)
    expected = torch.stack([with_it[0], without[1], with_it[2]]).mean()
    torch.testing.assert_close(value([4, 1, 0]), expected)
    torch.testing.assert_close(value([0, 1, 2]), without.mean())
    torch.testing.assert_close(value([1, 2, 7]), with_it.mean())


@pytest.mark.parametrize("objective", FEW_WEIGHED, ids=name)
def test_gradcheck_of_own_vectors(objective):
    u, v, _ = embeddings(5, 8, seed=1)
    v.data[4] = 1.0
    columns = Columns(numberings(8), (turn(0.3, teacher(5, 9)[0]),))
    negative_ids = numberings(8)[:, [1, 5, 7, 3, 0]]
    assert torch.autograd.gradcheck(
        lambda a, b, x, y: chunked_loss(a, b, objective, columns, Own(x, negative_ids, y), 2),
        [u, v, *mixtures(5)],
    )


@pytest.mark.parametrize("moving", ["u", "v", "negative", "positive"])
def test_all_but_one_input_may_be_fixed(moving):
    names = ("u", "v", "negative", "positive")
    made = dict(zip(names, (*embeddings(5, 8)[:2], *mixtures(5)), strict=True))
    made = {name: x if name == moving else x.detach() for name, x in made.items()}
    u, v, negative, positive = made.values()
    own = Own(negative, positive=positive)
    if moving in ("u", "v"):
        (expected,) = torch.autograd.grad(loss(similarity_matrix(u, v)), made[moving])
        (gradient,) = torch.autograd.grad(chunked_loss(u, v, chunk_size=2), made[moving])
        torch.testing.assert_close(gradient, expected)
    (expected,) = torch.autograd.grad(plainly(u, v, FocalInfoNCE(), PLAIN, own), made[moving])
    (gradient,) = torch.autograd.grad(chunked_loss(u, v, own=own, chunk_size=2), made[moving])
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("hide", [False, True], ids=["slopes", "no slopes"])
@pytest.mark.parametrize("own", [False, True])
def test_logits_are_computed_once_a_chunk(hide, own):
    @dataclass(frozen=True)
    class Counted(FocalInfoNCE):
        seen: ClassVar[list] = []

        def logits(self, sim, positives):
            self.seen.append(tuple(sim.shape))
            return super().logits(sim, positives)

    u, v, _ = embeddings(7, 12)
    objective = FocalWeight(WithoutSlopes(Counted()) if hide else Counted())
    own = Own(*mixtures(7)[:1]) if own else NOTHING
    chunked_loss(u, v, objective, own=own, chunk_size=3).backward()
    width = 12 + (own is not NOTHING)
    assert Counted.seen == [(3, width), (3, width), (1, width)]


def test_views_of_one_graph_share_its_gradient():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    head = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    views = (x @ head)[:5], (x @ head).tanh()
    (whole,) = torch.autograd.grad(loss(similarity_matrix(*views)), x, retain_graph=True)
    (chunked,) = torch.autograd.grad(chunked_loss(*views, chunk_size=2), x)
    torch.testing.assert_close(chunked, whole)
    (twice,) = torch.autograd.grad(chunked_loss(x, x, chunk_size=2), x)
    (expected,) = torch.autograd.grad(loss(similarity_matrix(x, x)), x)
    torch.testing.assert_close(twice, expected)


def test_no_gradient_is_needed():
    u, v, _ = embeddings(5, 8)
    for objective in (FocalInfoNCE(), *OWN):
        with torch.no_grad():
            value = chunked_loss(u, v, objective, chunk_size=2)
        assert not value.requires_grad
        torch.testing.assert_close(value, loss(similarity_matrix(u, v), objective).detach())


def test_second_derivatives_are_refused():
    u, v, _ = embeddings(5, 8)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(chunked_loss(u, v), u, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_half_precision_is_computed_in_float32(dtype, margin):
    u, v, _ = embeddings(5, 8, dtype=dtype)
    v.data[4] = 1.0  # the slope at a zero vector is beyond half precision
    by_block, matrix = teacher(5, 8, dtype=dtype)
    by_block, whole = (Columns(turns=(turn(margin, x),)) for x in (by_block, matrix))
    chunked = value_and_gradients(
        lambda a, b: chunked_loss(a, b, columns=by_block, chunk_size=2), (u, v)
    )
    assert chunked[0].dtype == torch.float32
    assert all(x.dtype == dtype and x.isfinite().all() for x in chunked[1:])
    full = [x.detach().float().requires_grad_() for x in (u, v)]
    value, *gradients = value_and_gradients(
        lambda a, b: loss(similarity_matrix(a, b), columns=whole), full
    )
    torch.testing.assert_close(chunked[0], value)
    expected = tuple(x.to(dtype) for x in gradients)
    torch.testing.assert_close(chunked[1:], expected, rtol=0.01, atol=1e-4)


def test_own_vectors_may_be_of_half_precision():
    u, v, _ = embeddings(5, 8, dtype=torch.bfloat16)
    inputs = (u, v, *mixtures(5, dtype=torch.bfloat16))
    full = [x.detach().float().requires_grad_() for x in inputs]
    half, expected = (
        value_and_gradients(
            lambda a, b, x, y: chunked_loss(a, b, own=Own(x, positive=y), chunk_size=2), each
        )
        for each in (inputs, full)
    )
    assert torch.equal(half[0], expected[0])
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(half[1:], expected[1:], strict=True))


def test_autocast_changes_nothing():
    u, v, _ = embeddings(5, 8, dtype=torch.float32)
    inputs = (u, v, *mixtures(5, dtype=torch.float32))

    def function(a, b, x, y):
        return chunked_loss(a, b, own=Own(x, positive=y), chunk_size=2)

    outside = value_and_gradients(function, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert (u @ v.T).dtype == torch.bfloat16
        inside = value_and_gradients(function, inputs)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


class LargestTensor(TorchDispatchMode):
    """Keeps the entries of the largest tensor that an operation returns."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.entries = max(self.entries, x.numel())
        return result


def test_the_matrix_is_never_whole():
    u, v, ids = embeddings(80, 96)
    with LargestTensor() as plain:
        loss(similarity_matrix(u, v), columns=Columns(ids)).backward()
    assert plain.entries == 80 * 96
    by_block, _ = teacher(80, 96)
    negative, positive = mixtures(80)
    for objective, columns, own in (
        (FocalInfoNCE(), Columns(ids), NOTHING),
        (WithoutSlopes(FocalInfoNCE()), Columns(ids), NOTHING),
        (FocalWeight(FocalInfoNCE()), Columns(turns=(turn(0.3, by_block),)), NOTHING),
        (FocalInfoNCE(), Columns(ids), Own(negative, ids[:80], positive)),
    ):
        with LargestTensor() as chunked:
            chunked_loss(u, v, objective, columns, own, chunk_size=4).backward()
        width = 96 + (own is not NOTHING)
        assert chunked.entries == max(4 * width, v.numel())


@pytest.mark.parametrize(
    ("rows", "columns", "match"),
    [
        ((3, 4), (3, 5), "u and v must be"),
        ((4,), (3, 4), "u and v must be"),
        ((3, 4), (), "u and v must be"),
        ((4, 4), (3, 4), "v must have a row"),
        ((0, 4), (3, 4), "v must have a row"),
    ],
)
def test_shapes_that_are_no_batch_are_refused(rows, columns, match):
    with pytest.raises(ValueError, match=match):
        chunked_loss(torch.zeros(rows), torch.zeros(columns), chunk_size=1)


IDS = torch.zeros(4, dtype=torch.int64)
UNIT = torch.eye(3)


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": -1}, "chunk_size"),
        ({"objective": "triplet"}, "objective 'triplet'"),
        ({"objective": 3}, "objective 3 is none"),
        ({"columns": Columns(IDS)}, r"sentence_ids must be \(3,\)"),
        ({"columns": Columns(IDS[None])}, r"or \(G, 3\)"),
        ({"columns": Columns(turns=(turn(0.1, torch.eye(4)),))}, "teacher must hold"),
        ({"columns": Columns(turns=(turn(0.1, torch.zeros(2, 3)),))}, "teacher must hold"),
        ({"own": Own(torch.eye(4)[:3])}, "own vectors must be"),
        ({"own": Own(positive=torch.eye(3)[:2])}, "own vectors must be"),
        ({"own": Own(UNIT, IDS[:3])}, "negative_ids must be"),
        ({"own": Own(UNIT, IDS), "columns": Columns(IDS[:3])}, "negative_ids must be"),
        ({"own": Own(UNIT, IDS[None, :3]), "columns": Columns(IDS[:3])}, "negative_ids must be"),
        ({"own": Own(None, IDS[:3]), "columns": Columns(IDS[:3])}, "negative_ids must be"),
        ({"own": Own(UNIT), "columns": Columns(IDS)}, r"sentence_ids must be \(3,\)"),
    ],
)
def test_bad_arguments_are_refused(argument, match):
    with pytest.raises(ValueError, match=match):
        chunked_loss(UNIT, UNIT, **argument)


@pytest.mark.parametrize("first", [-1, 3])
def test_blocks_without_their_positives_are_refused(first):
    for function in FUNCTIONS:
        with pytest.raises(ValueError, match="first"):
            function(torch.zeros(3, 5), columns=Columns(first=first))
