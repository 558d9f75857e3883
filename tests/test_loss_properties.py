"""What holds of the losses for any shape, similarities, ids and parameters in their ranges."""

from typing import get_args

import pytest
import torch

from fcse.losses import Modulate, Objective, chunked_loss, gradient_weights, loss, similarity_matrix

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

ARGUMENTS = st.fixed_dictionaries(
    {
        "objective": st.sampled_from(get_args(Objective)),
        "temperature": st.floats(0.01, 10),
        "m": st.floats(-2, 2),
        "modulate": st.sampled_from(get_args(Modulate)),
        "stop_gradient": st.booleans(),
        "alpha": st.floats(0, 20),
        "margin": st.just(0.0) | st.floats(0, 1.5),
        "focal_weight": st.booleans(),
    }
)


@st.composite
def batches(draw):
    """(N, M) similarities with M >= N, a teacher's, and ids of the M columns or None."""
    rows = draw(st.integers(1, 5))
    columns = draw(st.integers(rows, 7))
    size = rows * columns
    entries = draw(st.lists(st.floats(-1, 1), min_size=2 * size, max_size=2 * size))
    numbers = st.lists(st.integers(0, 3), min_size=columns, max_size=columns)
    ids = draw(st.none() | numbers | st.lists(numbers, min_size=1, max_size=3))
    sim, teacher = torch.tensor(entries, dtype=torch.float64).reshape(2, rows, columns)
    return sim, teacher, None if ids is None else torch.tensor(ids)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batches(), ARGUMENTS)
def test_loss_is_finite_and_its_gradient_is_the_closed_form(batch, arguments):
    sim, teacher, ids = batch
    sim.requires_grad_()
    arguments = {**arguments, "sentence_ids": ids, "teacher": teacher}
    value = loss(sim, **arguments)
    assert value.isfinite()
    assert value >= 0
    (gradient,) = torch.autograd.grad(value, sim)
    closed = gradient_weights(sim.detach(), **arguments)
    torch.testing.assert_close(closed, gradient, rtol=1e-9, atol=1e-12)
    # In single precision too, where exp overflows soonest.
    single = sim.detach().float().requires_grad_()
    loss(single, **arguments).backward()
    assert single.grad.isfinite().all()
    assert gradient_weights(single.detach(), **arguments).isfinite().all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batches(), ARGUMENTS, st.integers(1, 8), st.integers(0, 2**32))
def test_chunks_equal_the_whole(batch, arguments, chunk_size, seed):
    sim, _, ids = batch
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.randn(n, 4, dtype=torch.float64, generator=generator, requires_grad=True)
        for n in sim.shape
    )
    pair = tuple(torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in sim.shape)
    arguments = {**arguments, "sentence_ids": ids}
    whole = loss(similarity_matrix(u, v), teacher=similarity_matrix(*pair), **arguments)
    chunked = chunked_loss(u, v, chunk_size=chunk_size, teacher=pair, **arguments)
    torch.testing.assert_close(chunked, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(chunked, (u, v)),
        torch.autograd.grad(whole, (u, v)),
        rtol=1e-8,
        atol=1e-10,
    )
