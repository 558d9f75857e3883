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
    }
)


@st.composite
def batches(draw):
    """(N, M) similarities with M >= N, and ids of the M columns or None."""
    rows = draw(st.integers(1, 5))
    columns = draw(st.integers(rows, 7))
    size = rows * columns
    entries = draw(st.lists(st.floats(-1, 1), min_size=size, max_size=size))
    ids = draw(st.none() | st.lists(st.integers(0, 3), min_size=columns, max_size=columns))
    sim = torch.tensor(entries, dtype=torch.float64).reshape(rows, columns)
    return sim, None if ids is None else torch.tensor(ids)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batches(), ARGUMENTS)
def test_loss_is_finite_and_its_gradient_is_the_closed_form(batch, arguments):
    sim, ids = batch
    sim.requires_grad_()
    value = loss(sim, sentence_ids=ids, **arguments)
    assert value.isfinite()
    assert value >= 0
    (gradient,) = torch.autograd.grad(value, sim)
    closed = gradient_weights(sim.detach(), sentence_ids=ids, **arguments)
    torch.testing.assert_close(closed, gradient, rtol=1e-9, atol=1e-12)
    # In single precision too, where exp overflows soonest.
    single = sim.detach().float().requires_grad_()
    loss(single, sentence_ids=ids, **arguments).backward()
    assert single.grad.isfinite().all()
    assert gradient_weights(single.detach(), sentence_ids=ids, **arguments).isfinite().all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batches(), ARGUMENTS, st.integers(1, 8), st.integers(0, 2**32))
def test_chunks_equal_the_whole(batch, arguments, chunk_size, seed):
    sim, ids = batch
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.randn(n, 4, dtype=torch.float64, generator=generator, requires_grad=True)
        for n in sim.shape
    )
    whole = loss(similarity_matrix(u, v), sentence_ids=ids, **arguments)
    chunked = chunked_loss(u, v, sentence_ids=ids, chunk_size=chunk_size, **arguments)
    torch.testing.assert_close(chunked, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(chunked, (u, v)),
        torch.autograd.grad(whole, (u, v)),
        rtol=1e-8,
        atol=1e-10,
    )
