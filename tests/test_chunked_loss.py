"""The loss in chunks of rows against the loss of the whole matrix, and what it allocates."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fcse.losses import chunked_loss, gradient_weights, logits, loss, similarity_matrix

OBJECTIVES = {
    "info_nce": {"objective": "info_nce"},
    **{
        f"focal {modulate} {stopped}": {
            "objective": "focal_info_nce",
            "modulate": modulate,
            "stop_gradient": stopped,
        }
        for modulate in ("both", "positive", "negative", "none")
        for stopped in (False, True)
    },
    **{f"hardness {a}": {"objective": "hardness_info_nce", "alpha": a} for a in (0.0, 9.0)},
}


EXTENSIONS = {
    "margin": {"margin": 0.4},
    "focal weight": {"focal_weight": True},
    "both": {"margin": 0.4, "focal_weight": True},
}


def embeddings(rows, columns, seed=0, dtype=torch.float64):
    """Views of a few sentences with a zero vector and an opposite pair, and ids with repeats."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(columns, 6, dtype=torch.float64, generator=generator)
    u = v[:rows] + torch.randn(rows, 6, dtype=torch.float64, generator=generator)
    u[-1] = -v[rows - 1]
    v[columns // 2] = 0
    ids = torch.randint(max(2, columns // 2), (columns,), generator=generator)
    return u.to(dtype).requires_grad_(), v.to(dtype).requires_grad_(), ids


def value_and_gradients(function, u, v, scale=1.0):
    value = function(u, v)
    return (value, *torch.autograd.grad(scale * value, (u, v)))


def compare(u, v, chunk_size, scale=1.0, rtol=1e-9, atol=1e-11, **arguments):
    whole = value_and_gradients(
        lambda a, b: loss(similarity_matrix(a, b), **arguments), u, v, scale
    )
    chunked = value_and_gradients(
        lambda a, b: chunked_loss(a, b, chunk_size=chunk_size, **arguments), u, v, scale
    )
    for ours, expected in zip(chunked, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("arguments", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 7), (7, 12)])
def test_chunks_equal_the_whole(arguments, repeats, rows, columns):
    u, v, ids = embeddings(rows, columns)
    ids = ids if repeats else None
    for chunk_size in (1, 3, 7, 50, None):
        for temperature, m in [(0.05, 0.3), (0.5, -0.2)]:
            compare(
                u, v, chunk_size, 2.5, temperature=temperature, m=m, sentence_ids=ids, **arguments
            )


@pytest.mark.parametrize("arguments", OBJECTIVES.values(), ids=OBJECTIVES)
def test_chunks_equal_the_whole_in_float32(arguments):
    u, v, ids = embeddings(40, 53, dtype=torch.float32)
    compare(u, v, 9, sentence_ids=ids, rtol=2e-5, atol=2e-5, **arguments)


def teachers(rows, columns, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (rows, columns)
    )


def numberings(columns, seed=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(max(2, columns // 2), (2, columns), generator=generator)


@pytest.mark.parametrize("arguments", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("options", EXTENSIONS.values(), ids=EXTENSIONS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 7), (7, 12)])
def test_extended_chunks_equal_the_whole(arguments, options, rows, columns):
    u, v, _ = embeddings(rows, columns)
    pair = teachers(rows, columns)
    arguments = {**arguments, **options, "sentence_ids": numberings(columns)}
    whole = value_and_gradients(
        lambda a, b: loss(similarity_matrix(a, b), teacher=similarity_matrix(*pair), **arguments),
        u,
        v,
        2.5,
    )
    for chunk_size in (1, 3, None):
        chunked = value_and_gradients(
            lambda a, b, n=chunk_size: chunked_loss(a, b, teacher=pair, chunk_size=n, **arguments),
            u,
            v,
            2.5,
        )
        torch.testing.assert_close(chunked, whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("stopped", [False, True])
def test_extended_blocks_of_rows_are_those_of_the_matrix(stopped):
    u, v, _ = embeddings(7, 12)
    sim, teacher = similarity_matrix(u, v).detach(), similarity_matrix(*teachers(7, 12))
    arguments = {"stop_gradient": stopped, "sentence_ids": numberings(12), "margin": 0.4}
    blocks = [(0, 3), (3, 6), (6, 7)]
    for function in (loss, gradient_weights):
        whole = function(sim, **arguments, teacher=teacher, focal_weight=True)
        parts = [
            (b - a)
            / 7
            * function(sim[a:b], **arguments, teacher=teacher[a:b], focal_weight=True, first=a)
            for a, b in blocks
        ]
        joined = sum(parts) if function is loss else torch.cat(parts)
        torch.testing.assert_close(joined, whole)


def test_options_that_are_off_change_no_bit():
    u, v, ids = embeddings(7, 12, dtype=torch.float32)
    default = value_and_gradients(lambda a, b: chunked_loss(a, b, sentence_ids=ids), u, v)
    off = value_and_gradients(
        lambda a, b: chunked_loss(
            a, b, sentence_ids=ids[None], margin=0.0, teacher=teachers(7, 12), focal_weight=False
        ),
        u,
        v,
    )
    assert all(torch.equal(a, b) for a, b in zip(off, default, strict=True))


def test_gradcheck_of_the_extensions():
    u, v, _ = embeddings(5, 8, seed=1)
    v.data[4] = 1.0  # a zero vector has no derivative
    options = {"margin": 0.3, "teacher": teachers(5, 8), "focal_weight": True}
    assert torch.autograd.gradcheck(
        lambda a, b: chunked_loss(
            a, b, temperature=0.2, sentence_ids=numberings(8), chunk_size=2, **options
        ),
        [u, v],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_the_teacher_too(dtype):
    u, v, _ = embeddings(5, 8, dtype=dtype)
    v.data[4] = 1.0  # the slope at a zero vector is beyond half precision
    pair = tuple(x.to(dtype).requires_grad_() for x in teachers(5, 8))
    value, du, dv = value_and_gradients(
        lambda a, b: chunked_loss(a, b, margin=0.3, teacher=pair, chunk_size=2), u, v
    )
    assert value.dtype == torch.float32
    assert du.dtype == dv.dtype == dtype
    assert du.isfinite().all() and dv.isfinite().all()
    expected = loss(similarity_matrix(u, v), margin=0.3, teacher=similarity_matrix(*pair))
    torch.testing.assert_close(value, expected)
    assert pair[0].grad is None


@pytest.mark.parametrize("stopped", [False, True])
def test_blocks_of_rows_are_those_of_the_matrix(stopped):
    u, v, ids = embeddings(7, 12)
    sim = similarity_matrix(u, v).detach()
    arguments = {"stop_gradient": stopped, "sentence_ids": ids}
    blocks = [(0, 3), (3, 6), (6, 7)]
    rows = [logits(sim[a:b], **arguments, first=a) for a, b in blocks]
    assert torch.equal(torch.cat(rows), logits(sim, **arguments))
    weights = [(b - a) / 7 * gradient_weights(sim[a:b], **arguments, first=a) for a, b in blocks]
    torch.testing.assert_close(torch.cat(weights), gradient_weights(sim, **arguments))
    values = [(b - a) / 7 * loss(sim[a:b], **arguments, first=a) for a, b in blocks]
    torch.testing.assert_close(sum(values), loss(sim, **arguments))


def test_gradcheck():
    u, v, ids = embeddings(5, 8, seed=1)
    v.data[4] = 1.0  # a zero vector has no derivative
    assert torch.autograd.gradcheck(
        lambda a, b: chunked_loss(a, b, sentence_ids=ids, chunk_size=2), [u, v]
    )


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


@pytest.mark.parametrize("fixed", ["u", "v"])
def test_one_side_may_be_fixed(fixed):
    u, v, _ = embeddings(5, 8)
    moving = v if fixed == "u" else u
    u, v = (u.detach(), v) if fixed == "u" else (u, v.detach())
    (expected,) = torch.autograd.grad(loss(similarity_matrix(u, v)), moving)
    (gradient,) = torch.autograd.grad(chunked_loss(u, v, chunk_size=2), moving)
    torch.testing.assert_close(gradient, expected)


def test_no_gradient_is_needed():
    u, v, _ = embeddings(5, 8)
    with torch.no_grad():
        value = chunked_loss(u, v, chunk_size=2)
    assert not value.requires_grad
    torch.testing.assert_close(value, loss(similarity_matrix(u, v)).detach())


def test_second_derivatives_are_refused():
    u, v, _ = embeddings(5, 8)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(chunked_loss(u, v), u, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    u, v, _ = embeddings(5, 8, dtype=dtype)
    value, du, dv = value_and_gradients(lambda a, b: chunked_loss(a, b, chunk_size=2), u, v)
    assert value.dtype == torch.float32
    assert du.dtype == dv.dtype == dtype
    full = [x.detach().float().requires_grad_() for x in (u, v)]
    whole = value_and_gradients(lambda a, b: loss(similarity_matrix(a, b)), *full)
    torch.testing.assert_close(value, whole[0])
    torch.testing.assert_close(
        (du, dv), tuple(x.to(dtype) for x in whole[1:]), rtol=0.01, atol=1e-4
    )


def test_autocast_changes_nothing():
    u, v, _ = embeddings(5, 8, dtype=torch.float32)
    outside = value_and_gradients(lambda a, b: chunked_loss(a, b, chunk_size=2), u, v)
    with torch.autocast("cpu", torch.bfloat16):
        assert (u @ v.T).dtype == torch.bfloat16
        inside = value_and_gradients(lambda a, b: chunked_loss(a, b, chunk_size=2), u, v)
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
        loss(similarity_matrix(u, v), sentence_ids=ids).backward()
    assert plain.entries == 80 * 96
    with LargestTensor() as chunked:
        chunked_loss(u, v, sentence_ids=ids, chunk_size=4).backward()
    assert chunked.entries == max(4 * 96, v.numel())
    with LargestTensor() as extended:
        chunked_loss(
            u, v, chunk_size=4, margin=0.3, teacher=teachers(80, 96), focal_weight=True
        ).backward()
    assert extended.entries == chunked.entries


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


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": -1}, "chunk_size"),
        ({"objective": "triplet"}, "objective 'triplet'"),
        ({"temperature": 0.0}, "temperature"),
        ({"modulate": "neither"}, "modulate"),
        ({"objective": "hardness_info_nce", "alpha": -1.0}, "alpha"),
        ({"sentence_ids": torch.zeros(4, dtype=torch.int64)}, r"sentence_ids must be \(3,\)"),
        ({"sentence_ids": torch.zeros(2, 4, dtype=torch.int64)}, r"or \(G, 3\)"),
        ({"margin": 2.0}, "margin must be"),
        ({"margin": 0.1}, "needs a teacher"),
        ({"margin": 0.1, "teacher": (torch.eye(3), torch.eye(4))}, "teacher must hold"),
        ({"margin": 0.1, "teacher": (torch.eye(4), torch.eye(4)[:3])}, "teacher must hold"),
        ({"margin": 0.1, "teacher": (torch.zeros(3, 2), torch.zeros(3, 4))}, "teacher must hold"),
    ],
)
def test_bad_arguments_are_refused(argument, match):
    with pytest.raises(ValueError, match=match):
        chunked_loss(torch.eye(3), torch.eye(3), **argument)


@pytest.mark.parametrize("first", [-1, 3])
def test_blocks_without_their_positives_are_refused(first):
    for function in (logits, loss, gradient_weights):
        with pytest.raises(ValueError, match="first"):
            function(torch.zeros(3, 5), first=first)
