"""Gradient caching: a batch of any size in the memory of a micro-batch."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TokenIds = Sequence[Sequence[int]]


def backward(
    views: Callable[[TokenIds], tuple[Tensor, Tensor]],
    token_ids: TokenIds,
    micro_batch_size: int,
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Compute the loss of a whole batch and add its gradients to the parameters.

    A contrastive loss needs all embeddings at once, but each sentence's graph only by itself: the
    embeddings are computed without graphs, the loss gives their gradients, and each micro-batch is
    embedded once more, with the same dropout masks, to pass them on (Gao et al. 2021b, "Scaling
    Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983).

    Args:
        views: token ids of n sentences -> two views (n, D) each, see `SentenceEncoder.forward`.
        token_ids: N sentences.
        micro_batch_size: sentences whose graph is held at a time; from N on there is one pass.
        loss_of: u, v (N, D) -> loss ().

    Returns:
        () float, detached.
    """
    if micro_batch_size >= len(token_ids):
        loss = loss_of(*views(token_ids))
        loss.backward()
        return loss.detach()
    parts = [
        token_ids[start : start + micro_batch_size]
        for start in range(0, len(token_ids), micro_batch_size)
    ]
    states = []
    embedded = []
    with torch.no_grad():
        for part in parts:
            states.append(random_state())
            embedded.append(views(part))
    after = random_state()
    u, v = (torch.cat(view).requires_grad_() for view in zip(*embedded, strict=True))
    loss = loss_of(u, v)
    loss.backward()
    for part, state, *gradients in zip(
        parts, states, u.grad.split(micro_batch_size), v.grad.split(micro_batch_size), strict=True
    ):
        set_random_state(state)
        torch.autograd.backward(views(part), gradients)
    set_random_state(after)
    return loss.detach()


def random_state() -> dict[str, Tensor]:
    """The state of the generators that dropout draws from: uint8 tensors by kind of device."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Take the generators back to a `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
