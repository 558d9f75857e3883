"""What holds of the losses for any shape, similarities, ids and parameters in their ranges."""

import pytest
import torch
from formulas import MODULATES, WithoutSlopes

from fcse.losses import Columns, chunked_loss, gradient_weights, loss, similarity_matrix
from fcse.methods.adap_acse import turn
from fcse.methods.core_tuning import FocalWeight
from fcse.objectives import FocalInfoNCE, HardnessInfoNCE, InfoNCE

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

TEMPERATURE = st.floats(0.01, 10)
KINDS = st.one_of(
    st.builds(InfoNCE, TEMPERATURE),
    st.builds(
        FocalInfoNCE, TEMPERATURE, st.floats(-2, 2), st.sampled_from(MODULATES), st.booleans()
    ),
    st.builds(HardnessInfoNCE, TEMPERATURE, st.floats(0, 20)),
)
OBJECTIVES = KINDS | KINDS.map(FocalWeight) | KINDS.map(WithoutSlopes)
MARGINS = st.just(0.0) | st.floats(0, 1.5)


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
@given(batches(), OBJECTIVES, MARGINS)
def test_loss_is_finite_and_its_gradient_is_the_closed_form(batch, objective, margin):
    sim, teacher, ids = batch
    sim.requires_grad_()
    columns = Columns(ids, (turn(margin, teacher),) if margin else ())
    value = loss(sim, objective, columns)
    assert value.isfinite()
    assert value >= 0
    (gradient,) = torch.autograd.grad(value, sim)
    closed = gradient_weights(sim.detach(), objective, columns)
    torch.testing.assert_close(closed, gradient, rtol=1e-9, atol=1e-12)
    # In single precision too, where exp overflows soonest.
    single = sim.detach().float().requires_grad_()
    loss(single, objective, columns).backward()
    assert single.grad.isfinite().all()
    assert gradient_weights(single.detach(), objective, columns).isfinite().all()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batches(), OBJECTIVES, MARGINS, st.integers(1, 8), st.integers(0, 2**32))
def test_chunks_equal_the_whole(batch, objective, margin, chunk_size, seed):
    sim, teacher, ids = batch
    generator = torch.Generator().manual_seed(seed)
    u, v = (
        torch.randn(n, 4, dtype=torch.float64, generator=generator, requires_grad=True)
        for n in sim.shape
    )
    columns = Columns(ids, (turn(margin, teacher),) if margin else ())
    whole = loss(similarity_matrix(u, v), objective, columns)
    chunked = chunked_loss(u, v, objective, columns, chunk_size=chunk_size)
    torch.testing.assert_close(chunked, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(chunked, (u, v)),
        torch.autograd.grad(whole, (u, v)),
        rtol=1e-8,
        atol=1e-10,
    )
