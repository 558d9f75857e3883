"""Loss, pulls and chunked loss of any objective: written once, over its logits.

Similarities are an (N, M) matrix of cosines with M >= N: row i is the anchor u_i, column j < N is
the view v_j of sentence j, so positives lie on the diagonal; columns from N on are further
negatives. Half precision is computed in float32, float64 stays float64.

An objective is a value of `fcse.objectives` or a reader's own, see there; its name stands for its
defaults."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fcse.errors import InputError
from fcse.objectives import FocalInfoNCE, HardnessInfoNCE, InfoNCE, Modulate, name, named

CHUNK_ENTRIES = 2**22
"""Entries of the similarity matrix that `chunked_loss` holds at a time: 16 MiB of float32, of
which there are some ten at once. Larger ones are slower on a CPU: malloc maps each anew."""


class Turn(Protocol):
    """What similarities become before the objective sees them."""

    def __call__(self, sim: Tensor, positives: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Rows (n, M) of a matrix, from row `first` on -> (n, M) new ones, and d new / d old."""


@dataclass(frozen=True)
class Columns:
    """What is known of the columns that anchors are compared with, beside their vectors.

    Attributes:
        sentence_ids: (M,) int64, on the device of the similarities: which sentence a column holds;
            row i is that of column i. A negative that is its anchor's own sentence is a false one:
            its logit is -inf, so that it has no part in the softmax and gets no pull. None: no
            sentence occurs twice. Or (G, M) int64, G numberings: a negative that agrees with its
            anchor in any of them is left out, which eliminates pairs by a label as well; a column
            without label has a number of its own.
        turns: what the similarities become before the objective sees them, one after the other.
        first: where a matrix is a block of rows of a larger one, the number of its first row: row
            i is anchor first + i, and its positive is in column first + i."""

    sentence_ids: Tensor | None = None
    turns: tuple[Turn, ...] = ()
    first: int = 0


@dataclass(frozen=True)
class Own:
    """Vectors that count in one row alone.

    negative: (N, D) float, one more column for each row, behind those of all. negative_ids: (N,) or
    (G, N) int64, its sentence, as in `Columns`. positive: (N, D) float, in the place of v_i."""

    negative: Tensor | None = None
    negative_ids: Tensor | None = None
    positive: Tensor | None = None


FOCAL = FocalInfoNCE()
"""The objective where none is named."""
PLAIN = Columns()
"""Columns of which nothing is known: no sentence occurs twice, no similarity is turned."""
NOTHING = Own()
"""No vector that counts in one row alone."""


def full_precision(x: Tensor) -> Tensor:
    """Half precision as float32, everything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def unit_rows(x: Tensor) -> Tensor:
    """Each row scaled to length 1, in float32 at least; a zero row stays zero."""
    if x.ndim != 2:
        raise ValueError(f"embeddings must be (N, D), got {tuple(x.shape)}")
    return F.normalize(full_precision(x), dim=1)


def _unit_views(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[1]:
        raise ValueError(
            f"u and v must be (N, D) and (M, D), got {tuple(u.shape)} and {tuple(v.shape)}"
        )
    return unit_rows(u), unit_rows(v)


def similarity_matrix(u: Tensor, v: Tensor) -> Tensor:
    """Cosine similarity of every row of u, (N, D) float, with every row of v, (M, D) float.

    (N, M) float32 (float64 for float64 inputs), in [-1, 1] up to rounding. A zero vector has
    similarity 0 with everything."""
    # Autocast would take the product down to half precision again.
    with torch.autocast(u.device.type, enabled=False):
        u, v = _unit_views(u, v)
        return u @ v.T


def _positives(sim: Tensor, first: int) -> Tensor:
    positives = torch.zeros(sim.shape, dtype=torch.bool, device=sim.device)
    positives.diagonal(first).fill_(True)
    return positives


def repeats(sentence_ids: Tensor, rows: int, columns: int, first: int = 0) -> Tensor:
    """The false negatives of rows `first` and on: (rows, columns) bool, see `Columns`."""
    if sentence_ids.ndim not in (1, 2) or sentence_ids.shape[-1] != columns:
        raise ValueError(
            f"sentence_ids must be ({columns},), one for each column, or (G, {columns}), "
            f"got {tuple(sentence_ids.shape)}"
        )
    same = sentence_ids[..., first : first + rows, None] == sentence_ids[..., None, :]
    same = same.any(dim=0) if same.ndim == 3 else same
    same.diagonal(first).fill_(False)
    return same


@dataclass(frozen=True)
class _Rows:
    """A block of rows as the objective sees it; `slope` is that of the turns."""

    sim: Tensor
    positives: Tensor
    logits: Tensor
    slope: Tensor | None


def _rows(
    sim: Tensor,
    objective: Any,
    columns: Columns,
    leaf: bool = False,
    own: bool = False,
    own_ids: Tensor | None = None,
) -> _Rows:
    """Masks, turns and logits of a block; with `leaf` a graph from the turned similarities on.

    own: the last column is each row's own, behind those of all. own_ids: (n,) or (G, n) of it."""
    first = columns.first
    if sim.ndim != 2 or len(sim) == 0 or not 0 <= first <= sim.shape[1] - len(sim):
        raise ValueError(
            "sim must be (N, M) with N >= 1 and M >= N + first, first >= 0, "
            f"got {tuple(sim.shape)} and first {first}"
        )
    sim = full_precision(sim)
    positives = _positives(sim, first)
    slope = None
    for turn in columns.turns:
        sim, its_slope = turn(sim, positives, first)
        slope = its_slope if slope is None else slope * its_slope
    if leaf:
        sim = sim.detach().requires_grad_()
    logits = objective.logits(sim, positives)
    if logits.shape != sim.shape:
        raise InputError(
            f"{type(objective).__name__}.logits gives {tuple(logits.shape)} for similarities of "
            f"{tuple(sim.shape)}: one logit for each is needed"
        )
    if (ids := columns.sentence_ids) is not None:
        left_out = repeats(ids, len(sim), sim.shape[1] - own, first)
        if own:
            left_out = F.pad(left_out, (0, 1))
        if own_ids is not None:
            theirs = own_ids == ids[..., first : first + len(sim)]
            left_out[:, -1] = theirs.reshape(-1, len(sim)).any(dim=0)
        logits = logits.masked_fill(left_out, -math.inf)
    return _Rows(sim, positives, logits, slope)


def _value(logits: Tensor, first: int, objective: Any) -> Tensor:
    """The mean over rows of the cross-entropy, each row weighed as the objective says."""
    target = torch.arange(first, first + len(logits), device=logits.device)
    weight = getattr(objective, "row_weight", None)
    if weight is None:
        return F.cross_entropy(logits, target)
    log_p = -F.cross_entropy(logits, target, reduction="none")
    return -(weight(log_p) * log_p).mean()


def _pulls(rows: _Rows, first: int, objective: Any) -> Tensor:
    """dL/dsim of a block, from logits that are there already."""
    logits = rows.logits.detach()
    pulls = (logits.softmax(dim=1) - rows.positives.to(logits.dtype)) / len(logits)
    if weight := getattr(objective, "row_weight", None):
        with torch.enable_grad():
            log_p = logits.log_softmax(dim=1).diagonal(first).requires_grad_()
            (factor,) = torch.autograd.grad((-weight(log_p) * log_p).sum(), log_p)
        pulls = pulls * -factor[:, None]
    if rows.sim.requires_grad:
        (pulls,) = torch.autograd.grad(rows.logits, rows.sim, pulls)
    else:
        pulls = pulls * objective.slopes(rows.sim, rows.positives)
    return pulls if rows.slope is None else pulls * rows.slope


def logits(sim: Tensor, objective: Any = FOCAL, columns: Columns = PLAIN) -> Tensor:
    """The logits that the softmax of a row sees: (N, M) float32 (float64 for float64 input).

    sim: (N, M) float, cosine similarities, positives on the diagonal. objective: a value or a name.
    columns: what is known of the columns.

    ValueError: a tensor has another shape. InputError: no such objective, or logits of another
    shape."""
    return _rows(sim, named(objective), columns).logits


def loss(sim: Tensor, objective: Any = FOCAL, columns: Columns = PLAIN) -> Tensor:
    """The loss of a batch, (): cross-entropy of the logits with the diagonal, mean over rows.

    Where the objective has a row weight w, a row's loss is -w(log p) log p in place of -log p, p
    the softmax of its positive. Arguments, dtypes and errors as in `logits`."""
    objective = named(objective)
    return _value(_rows(sim, objective, columns).logits, columns.first, objective)


def gradient_weights(sim: Tensor, objective: Any = FOCAL, columns: Columns = PLAIN) -> Tensor:
    """The closed form of dL/dsim: how hard, and which way, the loss pulls on each similarity.

    With p the softmax of a row's logits z and y the one-hot diagonal, dL/ds_ij is
    (p_ij - y_ij) * dz_ij/ds_ij / N. A positive entry lowers the similarity under gradient descent,
    a negative one raises it: a modulated negative with s < -m/2 is drawn *towards* the anchor. A
    repeated sentence has p = 0, hence weight 0. A turn s' puts s' for s and a factor ds'/ds; a row
    weight multiplies row i by d(w(l) l)/dl at l = log p_ii. Where the objective has no slopes,
    autograd takes them from its logits. Arguments, dtypes and errors as in `logits`.

    (N, M), equal to autograd of the loss: the mean over rows puts a factor 1/N on each entry."""
    objective = named(objective)
    closed = hasattr(objective, "slopes")
    with torch.set_grad_enabled(not closed):
        rows = _rows(sim.detach(), objective, columns, leaf=not closed)
    return _pulls(rows, columns.first, objective)


def info_nce(sim: Tensor, temperature: float = 0.05) -> Tensor:
    """`loss` of InfoNCE, the objective of SimCSE (Gao et al. 2021, equation 4)."""
    return loss(sim, InfoNCE(temperature))


def focal_info_nce(
    sim: Tensor,
    temperature: float = 0.05,
    m: float = 0.3,
    modulate: Modulate = "both",
    stop_gradient: bool = False,
) -> Tensor:
    """`loss` of Focal-InfoNCE (Hou & Li 2023, section 3); parameters as in `FocalInfoNCE`."""
    return loss(sim, FocalInfoNCE(temperature, m, modulate, stop_gradient))


def hardness_info_nce(sim: Tensor, temperature: float = 0.05, alpha: float = 9.0) -> Tensor:
    """`loss` of the hardness-weighted softmax (Lan et al. 2025); see `HardnessInfoNCE`."""
    return loss(sim, HardnessInfoNCE(temperature, alpha))


class _LossInChunks(torch.autograd.Function):
    """`loss` of the cosines of unit vectors, with its gradient from the same pass over the rows.

    A chunk of rows has all its columns, so its softmax is complete and its share of the gradients
    follows from its logits at once: nothing is kept for the backward pass but the gradients."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        u: Tensor,
        v: Tensor,
        negative: Tensor | None,
        positive: Tensor | None,
        negative_ids: Tensor | None,
        plan: tuple[Any, Columns, int],
    ) -> Tensor:
        objective, columns, chunk_size = plan
        value = u.new_zeros(())
        du, dv = torch.zeros_like(u), torch.zeros_like(v)
        dn, dp = (None if x is None else torch.zeros_like(x) for x in (negative, positive))
        wanted = any(ctx.needs_input_grad)
        leaf = wanted and not hasattr(objective, "slopes")
        for first in range(0, len(u), chunk_size):
            at = slice(first, first + chunk_size)
            anchors = u[at]
            share = len(anchors) / len(u)
            sim = anchors @ v.T
            if positive is not None:
                sim.diagonal(first).copy_((anchors * positive[at]).sum(dim=1))
            if negative is not None:
                sim = torch.cat([sim, (anchors * negative[at]).sum(dim=1, keepdim=True)], dim=1)
            own_ids = None if negative_ids is None else negative_ids[..., at]
            block = replace(columns, first=first)
            with torch.set_grad_enabled(leaf):
                rows = _rows(sim, objective, block, leaf, negative is not None, own_ids)
            value += share * _value(rows.logits.detach(), first, objective)
            if not wanted:
                continue
            pulls = _pulls(rows, first, objective)
            if negative is not None:
                pulls, last = pulls[:, :-1], share * pulls[:, -1:]
                dn[at] = last * anchors
                du[at] += last * negative[at]
            if positive is not None:
                own = share * pulls.diagonal(first)[:, None]
                pulls = pulls.masked_fill(rows.positives[:, : len(v)], 0)
                dp[at] = own * anchors
                du[at] += own * positive[at]
            du[at] += share * (pulls @ v)
            dv.addmm_(pulls.T, anchors, alpha=share)
        ctx.save_for_backward(du, dv, dn, dp)
        return value

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a graph is asked for, in which these would be constants
            raise RuntimeError("chunked_loss has no second derivatives: take loss")
        return *(None if x is None else upstream * x for x in ctx.saved_tensors), None, None


def chunked_loss(
    u: Tensor,
    v: Tensor,
    objective: Any = FOCAL,
    columns: Columns = PLAIN,
    own: Own = NOTHING,
    chunk_size: int | None = None,
) -> Tensor:
    """The `loss` of `similarity_matrix(u, v)` without the matrix: a few of its rows at a time.

    Value and gradients are those of `loss` up to rounding, in memory that grows with N and M and
    not with their product. The gradients are computed along with the value, from one computation
    of the logits; asking for second derivatives (`create_graph`) raises RuntimeError.

    Args:
        u: (N, D) float, the anchors.
        v: (M, D) float, M >= N: v_i is the other view of u_i, rows from N on are further
            negatives.
        objective, columns: as in `logits`; `first` is not read.
        own: vectors that count in one row alone.
        chunk_size: rows at a time, >= 1; None takes `CHUNK_ENTRIES` / M.

    Dtypes and errors as in `logits`."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    with torch.autocast(u.device.type, enabled=False):
        u, v = _unit_views(u, v)
        if not 0 < len(u) <= len(v):
            raise ValueError(f"v must have a row for each of u's, got {len(v)} for {len(u)}")
        vectors = [None if x is None else unit_rows(x) for x in (own.negative, own.positive)]
        if any(x is not None and x.shape != u.shape for x in vectors):
            raise ValueError(f"own vectors must be {tuple(u.shape)}, one for each anchor")
        ids, own_ids = columns.sentence_ids, own.negative_ids
        alone = own.negative is None or ids is None
        if own_ids is not None and (alone or own_ids.shape != (*ids.shape[:-1], len(u))):
            raise ValueError(
                f"negative_ids must be ({len(u)},) or (G, {len(u)}), as sentence_ids are (M,) or "
                "(G, M), and have both these and a negative beside them"
            )
        plan = named(objective), columns, chunk_size or max(1, CHUNK_ENTRIES // len(v))
        return _LossInChunks.apply(u, v, *vectors, own_ids, plan)


def require_sound(objective: Any) -> None:
    """Raise InputError where what an objective makes of a row depends on others, or slopes lie.

    Such a loss would change with the rows computed at a time. Made rows are given as a whole and
    one by one, and logits, row weights and their gradients compared; slopes with autograd's."""
    generator = torch.Generator().manual_seed(0)
    sim, factors = torch.rand(2, 6, 9, dtype=torch.float64, generator=generator)
    sim = 2 * sim - 1
    positives = _positives(sim, 0)

    def differ(a: Tensor, b: Tensor) -> bool:
        return not torch.allclose(a, b, rtol=1e-9, atol=1e-12, equal_nan=True)

    @torch.enable_grad()
    def pulls(make: Callable[..., Tensor], x: Tensor, *others: Tensor) -> Tensor | None:
        """The gradient of what is made of six rows; None where one depends on another."""
        whole, single = x.clone().requires_grad_(), x.clone().requires_grad_()
        together = make(whole, *others)
        rows = [make(*(y[i : i + 1] for y in (single, *others))) for i in range(6)]
        shapes = [getattr(made, "shape", None) for made in (together, *rows)]
        if shapes != [x.shape, *[x[:1].shape] * 6]:
            return None
        apart = torch.cat(rows)
        found = [
            torch.autograd.grad((factors[:, : z[0].numel()].reshape(z.shape) * z).sum(), y)[0]
            if z.requires_grad
            else 0 * y
            for z, y in ((together, whole), (apart, single))
        ]
        return None if differ(together, apart) or differ(*found) else found[0]

    of_logits = pulls(objective.logits, sim, positives)
    if of_logits is None:
        raise InputError(
            f"rows depend on each other in {name(objective)}: the logits of a row must come from "
            "that row of sim and positives alone, and be as many as its similarities"
        )
    weight = getattr(objective, "row_weight", None)
    if weight and pulls(weight, sim[:, 0] - 1) is None:
        raise InputError(
            f"rows depend on each other in {name(objective)}: the weight of a row must come from "
            "its own log p alone, one number for each"
        )
    slopes = getattr(objective, "slopes", None)
    if slopes and differ(factors * slopes(sim, positives), of_logits):
        raise InputError(
            f"the slopes of {name(objective)} are not those of its logits: mend or drop them"
        )
