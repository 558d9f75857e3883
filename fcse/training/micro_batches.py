"""Gradient caching: a batch of any size in the memory of a micro-batch."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def backward(
    views: Callable[[Sequence[Item]], tuple[Tensor, ...]],
    items: Sequence[Item],
    micro_batch_size: int,
    loss_of: Callable[..., Tensor],
) -> Tensor:
    """Compute the loss of a whole batch and add its gradients to the parameters.

    A contrastive loss needs all embeddings at once, but each sentence's graph only by itself: the
    embeddings are computed without graphs, the loss gives their gradients, and each micro-batch is
    embedded once more, with the same dropout masks, to pass them on (Gao et al. 2021b, "Scaling
    Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983).

    views: n items -> tensors (n, ...), row i from item i alone. items: N of them, one a sentence.
    micro_batch_size: items whose graph is held at a time; from N on there is one pass. loss_of:
    those tensors with N rows each -> loss (); it reads every one of them.

    Returns the loss, () float, detached."""
    if micro_batch_size >= len(items):
        loss = loss_of(*views(items))
        loss.backward()
        return loss.detach()
    size = micro_batch_size
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    states, embedded = [], []
    with torch.no_grad():
        for part in parts:
            states.append(random_state())
            embedded.append(views(part))
    after = random_state()
    whole = [torch.cat(rows).requires_grad_() for rows in zip(*embedded, strict=True)]
    loss = loss_of(*whole)
    loss.backward()
    gradients = zip(*(x.grad.split(size) for x in whole), strict=True)
    for part, state, given in zip(parts, states, gradients, strict=True):
        set_random_state(state)
        torch.autograd.backward(views(part), given)
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
