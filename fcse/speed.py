"""What makes a training step cheaper on a CPU without changing what it computes.

Each lever stands alone. Measured on 2 cores without bf16 units, packaged encoder, batch 64, length
32, float32 (`benchmarks/training_step.py`): see the numbers beside each.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LENGTH_GROUPS = 4


def by_length(
    token_ids: Sequence[Sequence[int]],
    run: Callable[[list[Sequence[int]]], tuple[Tensor, ...]],
    device: torch.device,
) -> list[Tensor]:
    """Run a batch in groups of similar length, each padded to its own longest sentence.

    On a CPU padding costs as much as text, and the smaller groups stay in cache. On a GPU one
    large pass is faster, so there is one group.

    Args:
        token_ids: N sentences.
        run: maps n sentences to tensors of n rows each.
        device: where `run` computes.

    Returns:
        The tensors of `run` over all N sentences, rows in input order.
    """
    groups = LENGTH_GROUPS if device.type == "cpu" else 1
    order = sorted(range(len(token_ids)), key=lambda i: len(token_ids[i]))
    size = -(-len(order) // groups)
    parts = [
        run([token_ids[i] for i in order[start : start + size]])
        for start in range(0, len(order), size)
    ]
    rows = torch.argsort(torch.tensor(order, device=device))
    return [torch.cat(part)[rows] for part in zip(*parts, strict=True)]


@contextmanager
def first_token_only(backbone: nn.Module) -> Iterator[None]:
    """Within this context a BERT or RoBERTa backbone finishes its last layer for token 0 alone.

    Behind the last attention every token goes its own way, so when only the first is read, the
    output projection and the feed-forward of the others are wasted. The backbone then returns a
    `last_hidden_state` of length 1. Other architectures are left as they are.
    """
    if backbone.config.model_type not in ("bert", "roberta"):
        yield
        return
    hook = backbone.encoder.layer[-1].attention.output.register_forward_pre_hook(
        lambda _, arguments: tuple(x[:, :1] for x in arguments)
    )
    try:
        yield
    finally:
        hook.remove()
