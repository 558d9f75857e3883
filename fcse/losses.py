"""One similarity matrix in, a loss or its closed-form gradient weights out.

Every function takes `sim`, an (N, M) matrix of cosine similarities with M >= N: row i is the
anchor u_i, column j < N is the view v_j of sentence j, so positives lie on the diagonal; columns
from N on are further negatives. Two take the embeddings: `chunked_loss`, for batches whose matrix
does not fit in memory, and `core_tuning`, which mixes them. Half precision is computed in float32,
float64 stays float64.

Sources: InfoNCE as in SimCSE (Gao et al. 2021, equation 4); Focal-InfoNCE as in Hou & Li 2023
(arXiv 2310.06918, section 3) and their code: gradients flow through the modulation; the
hardness-weighted softmax as in Lan et al. 2025 (arXiv 2503.04812, equation 5); the adaptive
angular margin as in KDMCSE (Nguyen et al. 2024, arXiv 2403.17486) and the focal weight and mixed
pairs as in Core-tuning (Zhang et al. 2021, arXiv 2102.06605), each with their code; the
elimination of false negatives as in Chen et al. 2021 (arXiv 2106.03719).
"""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

Objective = Literal["info_nce", "focal_info_nce", "hardness_info_nce"]
Modulate = Literal["both", "positive", "negative", "none"]

ALPHA = 9.0
"""The hardness weight of Lan et al. 2025."""

MIN_NEGATIVE_WEIGHT = 0.8
"""The least share of the drawn negative in a mixed one, as in the code of Core-tuning."""

CHUNK_ENTRIES = 2**22
"""Entries of the similarity matrix that `chunked_loss` holds at a time: 16 MiB of float32, of
which there are some ten at once. Larger ones are slower on a CPU: malloc maps each anew."""


def check_parameters(
    temperature: float, m: float, modulate: str, alpha: float = 0.0, margin: float = 0.0
) -> None:
    """Raise ValueError unless each is in its range.

    temperature > 0, m is finite, alpha >= 0, `modulate` is known and 0 <= margin < pi/2.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
    if not math.isfinite(m):
        raise ValueError(f"m must be a finite number, got {m}")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be a finite number of at least 0, got {alpha}")
    if not 0 <= margin < math.pi / 2:
        raise ValueError(f"margin must be an angle from 0 to below pi/2, got {margin}")
    if modulate not in get_args(Modulate):
        raise ValueError(
            f"unknown modulate {modulate!r}: choose from {', '.join(get_args(Modulate))}"
        )


def _full_precision(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _check_similarities(sim: Tensor, first: int) -> Tensor:
    if sim.ndim != 2 or len(sim) == 0 or not 0 <= first <= sim.shape[1] - len(sim):
        raise ValueError(
            "sim must be (N, M) with N >= 1 and M >= N + first, first >= 0, "
            f"got {tuple(sim.shape)} and first {first}"
        )
    return _full_precision(sim)


def _positives(sim: Tensor, first: int) -> Tensor:
    positives = torch.zeros(sim.shape, dtype=torch.bool, device=sim.device)
    positives.diagonal(first).fill_(True)
    return positives


def _repeats(sentence_ids: Tensor, positives: Tensor, first: int) -> Tensor:
    rows, columns = positives.shape
    if sentence_ids.ndim not in (1, 2) or sentence_ids.shape[-1] != columns:
        raise ValueError(
            f"sentence_ids must be ({columns},), one for each column, or (G, {columns}), "
            f"got {tuple(sentence_ids.shape)}"
        )
    same = sentence_ids[..., first : first + rows, None] == sentence_ids[..., None, :]
    return (same.any(dim=0) if same.ndim == 3 else same) & ~positives


def _with_margin(
    sim: Tensor, positives: Tensor, margin: float, teacher: Tensor | None
) -> tuple[Tensor, Tensor]:
    """s' = cos(theta - d) of each negative with theta > margin, s of the others, and ds'/ds."""
    if teacher is None:
        raise ValueError("a margin above 0 needs a teacher: its similarities of the sentences")
    if teacher.shape != sim.shape:
        raise ValueError(
            "teacher must hold a similarity for each of sim's, "
            f"got {tuple(teacher.shape)} for {tuple(sim.shape)}"
        )
    angle = margin * (1 - teacher.detach().to(sim.dtype))
    angle = angle.masked_fill(positives | (sim >= math.cos(margin)), 0)
    cos, sin = angle.cos(), angle.sin()
    square = (1 - sim) * (1 + sim)
    # At |s| = 1 the root has no finite slope: the floor makes it 0, for autograd too.
    height = square.clamp_min(torch.finfo(sim.dtype).tiny).sqrt()
    slope = cos - sin * sim.detach() * (square > 0) / height.detach()
    return sim * cos + height * sin, slope


def _unit_rows(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if u.ndim != 2 or v.ndim != 2 or u.shape[1] != v.shape[1]:
        raise ValueError(
            f"u and v must be (N, D) and (M, D), got {tuple(u.shape)} and {tuple(v.shape)}"
        )
    return F.normalize(_full_precision(u), dim=1), F.normalize(_full_precision(v), dim=1)


def _unit_views(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    u, v = _unit_rows(u, v)
    if not 0 < len(u) <= len(v):
        raise ValueError(f"v must have a row for each of u's, got {len(v)} for {len(u)}")
    return u, v


def _unit_teacher(teacher: tuple[Tensor, Tensor], u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    anchors, columns = (x.detach() for x in teacher)
    width = anchors.shape[-1:]
    if anchors.shape != (len(u), *width) or columns.shape != (len(v), *width):
        raise ValueError(
            f"teacher must hold ({len(u)}, E) and ({len(v)}, E) embeddings, "
            f"got {tuple(anchors.shape)} and {tuple(columns.shape)}"
        )
    return _unit_rows(anchors, columns)


def similarity_matrix(u: Tensor, v: Tensor) -> Tensor:
    """Cosine similarity of every row of u with every row of v.

    Args:
        u: (N, D) float, the anchors.
        v: (M, D) float, the candidates. A zero vector has similarity 0 with everything.

    Returns:
        (N, M) float32 (float64 for float64 inputs), values in [-1, 1] up to rounding.
    """
    # Autocast would take the product down to half precision again.
    with torch.autocast(u.device.type, enabled=False):
        u, v = _unit_rows(u, v)
        return u @ v.T


def logits(
    sim: Tensor,
    temperature: float = 0.05,
    m: float = 0.3,
    modulate: Modulate = "both",
    stop_gradient: bool = False,
    alpha: float = 0.0,
    sentence_ids: Tensor | None = None,
    first: int = 0,
    *,
    margin: float = 0.0,
    teacher: Tensor | None = None,
) -> Tensor:
    """The logits that the softmax of a row sees: s/tau, or a form that weighs hardness.

    Modulated positives are s * s / tau, modulated negatives s * (s + m) / tau (Hou & Li 2023,
    section 3). `modulate` says which of the two parts is on; "none" is plain InfoNCE. A hardness
    weight adds alpha * s to each negative, as a constant (Lan et al. 2025, equation 5).

    A margin turns negatives towards their anchor, the more the less alike the teacher finds the
    two sentences: with theta = arccos(s) > margin and the teacher's similarity t, s gives way to
    s' = cos(theta - (1 - t) margin), which is then modulated; the hardness weight stays one of s
    (AdapACSE of KDMCSE, Nguyen et al. 2024). As in their code s' jumps at theta = margin. Theirs
    turns by the whole margin where it has no teacher, which a teacher of zeros does here.

    Args:
        sim: (N, M) float, cosine similarities, positives on the diagonal.
        temperature: tau > 0.
        m: shift of the negatives' modulation; the resting point of a negative is s = -m/2.
        modulate: "both", "positive", "negative" or "none".
        stop_gradient: take the modulating factors, s and s + m, as constants: the logits stay,
            but their slopes fall to s and s + m, and the resting point moves to s = -m. The
            authors' code does not.
        alpha: >= 0, the hardness weight; 0 adds nothing.
        sentence_ids: (M,) int64, on the device of `sim`: column j holds sentence sentence_ids[j],
            and row i is sentence_ids[i]. A negative that is its anchor's own sentence is a false
            one: its logit is -inf, so that it has no part in the softmax and gets no pull. None:
            no sentence occurs twice. Or (G, M) int64, G numberings of the columns: a negative
            that agrees with its anchor in any of them is a false one, which eliminates pairs by a
            label as well (Chen et al. 2021); a column without label has a number of its own.
        first: where `sim` is a block of rows of a larger matrix, the number of its first row: row
            i is anchor first + i, and its positive is in column first + i.
        margin: radians, 0 <= margin < pi/2; 0 turns nothing. The authors take 0.05.
        teacher: (N, M) float, on the device of `sim`, the teacher's similarities in [-1, 1], taken
            as constants. Needed for a margin above 0, and without effect at 0.

    Returns:
        (N, M) float32 (float64 for float64 input).

    Raises:
        ValueError: a parameter is out of range, a margin has no teacher, or a tensor has another
            shape.
    """
    check_parameters(temperature, m, modulate, alpha, margin)
    sim = _check_similarities(sim, first)
    positives = _positives(sim, first)
    near = _with_margin(sim, positives, margin, teacher)[0] if margin else sim
    factor = near.detach() if stop_gradient else near
    positive = near * factor if modulate in ("both", "positive") else near
    negative = near * (factor + m) if modulate in ("both", "negative") else near
    rows = torch.where(positives, positive, negative) / temperature
    if alpha:
        rows = rows + alpha * sim.detach().masked_fill(positives, 0)
    if sentence_ids is not None:
        rows = rows.masked_fill(_repeats(sentence_ids, positives, first), -math.inf)
    return rows


def focal_info_nce(
    sim: Tensor,
    temperature: float = 0.05,
    m: float = 0.3,
    modulate: Modulate = "both",
    stop_gradient: bool = False,
) -> Tensor:
    """Focal-InfoNCE: cross-entropy of the modulated logits, mean over rows (Hou & Li 2023).

    With `modulate="none"` it equals `info_nce`. Arguments and errors as in `logits`.

    Returns:
        () float32 (float64 for float64 input).
    """
    return _cross_entropy(logits(sim, temperature, m, modulate, stop_gradient))


def hardness_info_nce(sim: Tensor, temperature: float = 0.05, alpha: float = ALPHA) -> Tensor:
    """InfoNCE with a hardness-weighted softmax: alpha * stop_gradient(s) on each negative logit.

    Lan et al. 2025 (arXiv 2503.04812, equation 5), alpha = 9 there; what sentence-transformers
    offers as `hardness_mode="in_batch_negatives"`. It moves the softmax towards hard negatives
    and leaves the slope of every logit at 1/tau. With alpha 0 it equals `info_nce`. Arguments,
    result and errors as in `focal_info_nce`.
    """
    return _cross_entropy(logits(sim, temperature, modulate="none", alpha=alpha))


def _cross_entropy(rows: Tensor, first: int = 0, focal_weight: bool = False) -> Tensor:
    target = torch.arange(first, first + len(rows), device=rows.device)
    if not focal_weight:
        return F.cross_entropy(rows, target)
    log_p = -F.cross_entropy(rows, target, reduction="none")
    return (log_p.expm1() * log_p).mean()


def info_nce(sim: Tensor, temperature: float = 0.05) -> Tensor:
    """InfoNCE: cross-entropy of s/tau with the diagonal as target, mean over rows (SimCSE, eq. 4).

    Arguments, result and errors as in `focal_info_nce`.
    """
    return focal_info_nce(sim, temperature, modulate="none")


def effective_modulation(objective: Objective, modulate: Modulate) -> Modulate:
    """The part of the modulation an objective applies: only Focal-InfoNCE applies any.

    Raises:
        ValueError: unknown objective.
    """
    if objective not in get_args(Objective):
        raise ValueError(
            f"unknown objective {objective!r}: choose from {', '.join(get_args(Objective))}"
        )
    return modulate if objective == "focal_info_nce" else "none"


def effective_alpha(objective: Objective, alpha: float) -> float:
    """The hardness weight an objective applies: only the hardness-weighted softmax applies any."""
    return alpha if objective == "hardness_info_nce" else 0.0


def loss(
    sim: Tensor,
    objective: Objective = "focal_info_nce",
    temperature: float = 0.05,
    m: float = 0.3,
    modulate: Modulate = "both",
    stop_gradient: bool = False,
    alpha: float = ALPHA,
    sentence_ids: Tensor | None = None,
    first: int = 0,
    *,
    margin: float = 0.0,
    teacher: Tensor | None = None,
    focal_weight: bool = False,
) -> Tensor:
    """The loss of a batch by the name of its objective; the others' parameters are ignored.

    With `focal_weight` the loss of a row is -(1 - p) log p in place of -log p, where p is the
    softmax of its positive: rows that are solved count less (Core-tuning, Zhang et al. 2021). As
    in their code gradients flow through the weight. Arguments as in `gradient_weights`; result
    and errors as in `focal_info_nce`.
    """
    modulate = effective_modulation(objective, modulate)
    alpha = effective_alpha(objective, alpha)
    rows = logits(
        sim,
        temperature,
        m,
        modulate,
        stop_gradient,
        alpha,
        sentence_ids,
        first,
        margin=margin,
        teacher=teacher,
    )
    return _cross_entropy(rows, first, focal_weight)


def gradient_weights(
    sim: Tensor,
    objective: Objective = "focal_info_nce",
    temperature: float = 0.05,
    m: float = 0.3,
    modulate: Modulate = "both",
    stop_gradient: bool = False,
    alpha: float = ALPHA,
    sentence_ids: Tensor | None = None,
    first: int = 0,
    *,
    margin: float = 0.0,
    teacher: Tensor | None = None,
    focal_weight: bool = False,
) -> Tensor:
    """The closed form of dL/dsim: how hard, and which way, the loss pulls on each similarity.

    With p the softmax of a row's logits and y the one-hot diagonal, dL/ds_ij is
    (p_ij - y_ij) * slope_ij / (N tau). The slope is 1 where nothing is modulated, 2 s for a
    modulated positive and 2 s + m for a modulated negative; s and s + m with `stop_gradient`. A
    negative entry raises the similarity under gradient descent, a positive one lowers it: a
    modulated negative with s < -m/2 is drawn *towards* the anchor. The hardness weight acts
    through p alone.

    A margin puts s' for s in these slopes, times ds'/ds = cos d - s / sqrt(1 - s^2) sin d with
    d = (1 - t) margin, for the negatives that it turns; at |s| = 1, where that has no bound, it
    is taken as cos d. The focal weight multiplies row i by (1 - p_ii) - p_ii log p_ii.

    Args:
        sim: (N, M) float, cosine similarities, positives on the diagonal.
        objective: "info_nce", "focal_info_nce" or "hardness_info_nce".
        temperature, m: as in `logits`.
        modulate, stop_gradient: as in `logits`, for focal_info_nce.
        alpha: as in `logits`, for hardness_info_nce.
        sentence_ids: as in `logits`; a repeated sentence has p = 0, hence weight 0.
        first: as in `logits`; N is the number of rows in the block.
        margin, teacher: as in `logits`, for every objective.
        focal_weight: as in `loss`, for every objective.

    Returns:
        (N, M) float32 (float64 for float64 input), equal to autograd of the loss; the mean over
        rows puts a factor 1/N on each entry.
    """
    modulate = effective_modulation(objective, modulate)
    alpha = effective_alpha(objective, alpha)
    rows = logits(
        sim,
        temperature,
        m,
        modulate,
        stop_gradient,
        alpha,
        sentence_ids,
        first,
        margin=margin,
        teacher=teacher,
    )
    p = rows.softmax(dim=1)
    sim, positives = _full_precision(sim), _positives(sim, first)
    one = torch.ones_like(sim)
    near, turn = _with_margin(sim, positives, margin, teacher) if margin else (sim, None)
    own = 0 if stop_gradient else near  # the factor's share of the slope
    slope = torch.where(
        positives,
        near + own if modulate in ("both", "positive") else one,
        near + own + m if modulate in ("both", "negative") else one,
    )
    weights = (p - positives.to(p.dtype)) * slope / (len(sim) * temperature)
    if turn is not None:
        weights = weights * turn
    if focal_weight:
        log_p = rows.log_softmax(dim=1).diagonal(first)
        weights = weights * -(log_p.expm1() + log_p * log_p.exp())[:, None]
    return weights


class _LossInChunks(torch.autograd.Function):
    """`loss` of the cosines of unit vectors, with its gradient from the same pass over the rows.

    A chunk of rows has all its columns, so its softmax is complete and its share of both
    gradients follows from `gradient_weights` at once: nothing is kept for the backward pass but
    the gradients themselves.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        u: Tensor,
        v: Tensor,
        chunk_size: int,
        teacher: tuple[Tensor, Tensor] | None,
        arguments: dict[str, Any],
    ) -> Tensor:
        value = u.new_zeros(())
        du, dv = torch.empty_like(u), torch.zeros_like(v)
        for first in range(0, len(u), chunk_size):
            anchors = u[first : first + chunk_size]
            share = len(anchors) / len(u)
            sim = anchors @ v.T
            if teacher is not None:
                theirs = teacher[0][first : first + chunk_size] @ teacher[1].T
                arguments = {**arguments, "teacher": theirs}
            value += share * loss(sim, **arguments, first=first)
            if any(ctx.needs_input_grad):
                weights = gradient_weights(sim, **arguments, first=first)
                du[first : first + chunk_size] = share * (weights @ v)
                dv.addmm_(weights.T, anchors, alpha=share)
        ctx.save_for_backward(du, dv)
        return value

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a graph is asked for, in which du and dv would be constants
            raise RuntimeError("chunked_loss has no second derivatives: take loss")
        du, dv = ctx.saved_tensors
        return upstream * du, upstream * dv, None, None, None


def chunked_loss(
    u: Tensor,
    v: Tensor,
    objective: Objective = "focal_info_nce",
    temperature: float = 0.05,
    m: float = 0.3,
    modulate: Modulate = "both",
    stop_gradient: bool = False,
    alpha: float = ALPHA,
    sentence_ids: Tensor | None = None,
    chunk_size: int | None = None,
    *,
    margin: float = 0.0,
    teacher: tuple[Tensor, Tensor] | None = None,
    focal_weight: bool = False,
) -> Tensor:
    """The `loss` of `similarity_matrix(u, v)` without the matrix: a few of its rows at a time.

    Value and gradients are those of `loss` up to rounding, in memory that grows with N and M and
    not with their product. The gradients are computed along with the value; asking for second
    derivatives (`create_graph`) raises RuntimeError.

    Args:
        u: (N, D) float, the anchors.
        v: (M, D) float, M >= N: v_i is the other view of u_i, rows from N on are further
            negatives.
        objective, temperature, m, modulate, stop_gradient, alpha: as in `gradient_weights`.
        sentence_ids: (M,) or (G, M) int64, as in `logits`.
        chunk_size: rows at a time, >= 1; None takes `CHUNK_ENTRIES` / M.
        margin, focal_weight: as in `gradient_weights`.
        teacher: (N, E) and (M, E) float, the teacher's embeddings of the anchors and of the
            columns, taken as constants: their cosines are the `teacher` of `logits`.

    Returns:
        () float32 (float64 for float64 inputs).

    Raises:
        ValueError: a parameter is out of range, a margin has no teacher, or a tensor has another
            shape.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    arguments = {
        "objective": objective,
        "temperature": temperature,
        "m": m,
        "modulate": modulate,
        "stop_gradient": stop_gradient,
        "alpha": alpha,
        "sentence_ids": sentence_ids,
        "margin": margin,
        "focal_weight": focal_weight,
    }
    with torch.autocast(u.device.type, enabled=False):
        u, v = _unit_views(u, v)
        chunk_size = chunk_size or max(1, CHUNK_ENTRIES // len(v))
        theirs = _unit_teacher(teacher, u, v) if margin and teacher is not None else None
        return _LossInChunks.apply(u, v, chunk_size, theirs, arguments)


def _mix(a: Tensor, b: Tensor, weight: Tensor | float) -> Tensor:
    weight = torch.as_tensor(weight, dtype=a.dtype, device=a.device)
    if weight.shape not in ((), (len(a),)):
        raise ValueError(f"a mixing weight must be ({len(a)},), got {tuple(weight.shape)}")
    weight = weight.reshape(-1, 1)
    return F.normalize(weight * a + (1 - weight) * b, dim=1)


def mixed_pairs(
    u: Tensor,
    v: Tensor,
    positive_weight: Tensor | float = 1.0,
    negative_weight: Tensor | float | None = None,
    negative_columns: Tensor | None = None,
    sentence_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A harder positive and a harder negative for each anchor (Core-tuning, Zhang et al. 2021).

    The positive is lam v_i + (1 - lam) v_j, j the hardest negative of anchor i, that is the one
    with the largest s_ij; the negative is lam v_k + (1 - lam) u_i, k a negative that the caller
    draws. Gradients flow through both parts of a mixture. The authors' code mixes the features of
    the encoder, ahead of the projection; this mixes unit embeddings.

    Args:
        u: (N, D) float, the anchors.
        v: (M, D) float, M >= N, as in `chunked_loss`.
        positive_weight: (N,) float or one number, in [0, 1]: the share lam of v_i. Authors: drawn
            from Beta(1, 1). 1 mixes nothing in.
        negative_weight: (N,) float or one number, in [0, 1]: the share lam of v_k. Authors: drawn
            from Beta(1, 1); below `MIN_NEGATIVE_WEIGHT` it is raised to it, as they do. None: no
            harder negative.
        negative_columns: (N,) int64, the column k of each anchor.
        sentence_ids: (M,) or (G, M) int64, as in `logits`: a false negative is never the hardest.
            An anchor without any true negative keeps v_i.

    Returns:
        (N, D) float32 (float64 for float64 inputs) unit vectors, the positives; the same, or None,
        the negatives.

    Raises:
        ValueError: a tensor has another shape, or a negative weight has no columns.
    """
    with torch.autocast(u.device.type, enabled=False):
        u, v = _unit_views(u, v)
        sim = u.detach() @ v.detach().T
    positives = _positives(sim, 0)
    if sentence_ids is not None:
        sim = sim.masked_fill(_repeats(sentence_ids, positives, 0), -math.inf)
    # No cosine is as low as -2: the positive is taken where no true negative is left.
    hardest = sim.masked_fill(positives, -2).argmax(dim=1)
    positive = _mix(v[: len(u)], v[hardest], positive_weight)
    if negative_weight is None:
        return positive, None
    if negative_columns is None or negative_columns.shape != (len(u),):
        raise ValueError(f"a negative weight needs negative_columns, ({len(u)},) int64")
    share = torch.as_tensor(negative_weight).clamp_min(MIN_NEGATIVE_WEIGHT)
    return positive, _mix(v[negative_columns], u, share)


def core_tuning(
    u: Tensor,
    v: Tensor,
    positive_weight: Tensor | float = 1.0,
    negative_weight: Tensor | float | None = None,
    negative_columns: Tensor | None = None,
    objective: Objective = "focal_info_nce",
    temperature: float = 0.05,
    m: float = 0.3,
    modulate: Modulate = "both",
    stop_gradient: bool = False,
    alpha: float = ALPHA,
    sentence_ids: Tensor | None = None,
    *,
    margin: float = 0.0,
    teacher: tuple[Tensor, Tensor] | None = None,
    focal_weight: bool = False,
) -> Tensor:
    """The loss with the `mixed_pairs` of Core-tuning, on the whole matrix.

    The mean of two losses: the usual one, and that with the harder positive in place of v_i. In
    both the harder negative of an anchor is one more logit of its row, of its row alone; where
    the drawn column is a false negative or the anchor's own it is left out. With the default
    weights nothing is mixed and the loss is `loss`, up to rounding. The authors' code keeps such
    draws, and counts the mixed vectors as further anchors of a supervised contrastive loss; here
    they are candidates only.

    Args:
        u, v, positive_weight, negative_weight, negative_columns: as in `mixed_pairs`.
        objective, temperature, m, modulate, stop_gradient, alpha: as in `gradient_weights`.
        sentence_ids: (M,) or (G, M) int64, as in `logits`.
        margin, teacher: as in `chunked_loss`; a harder negative has the teacher's similarity of
            the sentence that was drawn.
        focal_weight: as in `loss`; Core-tuning has it on.

    Returns:
        () float32 (float64 for float64 inputs).

    Raises:
        ValueError: as in `chunked_loss` and `mixed_pairs`.
    """
    modulate = effective_modulation(objective, modulate)
    alpha = effective_alpha(objective, alpha)
    with torch.autocast(u.device.type, enabled=False):
        u, v = _unit_views(u, v)
        sim = u @ v.T
        theirs = None
        if margin and teacher is not None:
            anchors, columns = _unit_teacher(teacher, u, v)
            theirs = anchors @ columns.T
    positives = _positives(sim, 0)
    false = torch.zeros_like(positives)
    if sentence_ids is not None:
        false = _repeats(sentence_ids, positives, 0)
    positive, negative = mixed_pairs(
        u, v, positive_weight, negative_weight, negative_columns, sentence_ids
    )
    if negative is not None:
        drawn = negative_columns[:, None]
        false = torch.cat([false, (false | positives).gather(1, drawn)], dim=1)
        sim = torch.cat([sim, (u * negative).sum(dim=1, keepdim=True)], dim=1)
        if theirs is not None:
            theirs = torch.cat([theirs, theirs.gather(1, drawn)], dim=1)
    harder = torch.where(_positives(sim, 0), (u * positive).sum(dim=1, keepdim=True), sim)

    def value(sim: Tensor) -> Tensor:
        rows = logits(
            sim, temperature, m, modulate, stop_gradient, alpha, margin=margin, teacher=theirs
        )
        return _cross_entropy(rows.masked_fill(false, -math.inf), focal_weight=focal_weight)

    return (value(sim) + value(harder)) / 2
