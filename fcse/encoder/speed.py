"""What makes a training step cheaper on a CPU without changing what it computes.

`benchmarks/training_step.py` measures it, lever by lever."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from fcse.encoder.packing import CHEAP, Embedding, Packing, is_bert

LENGTH_GROUPS = 4
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # as malloc.h numbers them


def length_groups(
    token_ids: Sequence[Sequence[int]], embedding: Embedding, device: torch.device
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Cut a batch into groups of similar length: their rows, and the backbone's inputs for them.

    Each is padded to its own longest sentence. On a CPU padding costs as much as text, and smaller
    groups stay in cache; on a GPU one large pass is faster, so there is one group. `embedding`,
    (T,) ids -> (T, D) float, takes the tokens of all groups at once: the gradient of the word
    embeddings is as large as the table, whatever the batch."""
    groups = LENGTH_GROUPS if device.type == "cpu" else 1
    lengths = [len(ids) for ids in token_ids]
    flat = torch.tensor([token for ids in token_ids for token in ids], device=device)
    vectors = embedding(flat).split(lengths)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    size = -(-len(order) // groups)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        columns = torch.arange(lengths[rows[-1]], device=device)
        mask = columns < torch.tensor([[lengths[i]] for i in rows], device=device)
        padded = pad_sequence([vectors[i] for i in rows], batch_first=True)
        yield rows, {"inputs_embeds": padded, "attention_mask": mask.long()}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within this context glibc keeps what is freed for what is needed next.

    It gives large blocks back to the system and takes them again page by page: 14,000 page faults
    in each bf16 step of the packaged encoder, 7 % of its time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        mallopt(_MMAP_MAX, 65_536)
        mallopt(_TRIM_THRESHOLD, 131_072)


def in_bf16(encoder: nn.Module) -> Callable[..., tuple[Tensor, ...]]:
    """An encoder's forward, all of it in bf16; gradients reach its own float32 weights.

    Autocast keeps the stream between the layers in float32, and casts it at each product. The
    table of words stays as it is: a batch reads few of its rows."""
    table = encoder.backbone.get_input_embeddings().weight
    low = {name: x.bfloat16() for name, x in encoder.named_parameters() if x is not table}
    return lambda *arguments: functional_call(encoder, low, arguments)


@contextmanager
def first_token_only(backbone: PreTrainedModel, packing: Packing | None = None) -> Iterator[None]:
    """Within this context a BERT or RoBERTa backbone finishes its last layer for token 0 alone.

    Behind the last attention every token goes its own way, so when only the first is read, the
    output projection and the feed-forward of the others are wasted. The backbone then returns a
    `last_hidden_state` (n, 1, D). Other architectures are left as they are."""
    if not is_bert(backbone):
        yield
        return

    def first(x: Tensor) -> Tensor:
        return x[:, :1] if packing is None else x[0, packing.first].unsqueeze(1)

    output = backbone.encoder.layer[-1].attention.output
    hook = output.register_forward_pre_hook(lambda _, arguments: tuple(map(first, arguments)))
    try:
        yield
    finally:
        hook.remove()


def cheap_dropout(x: Tensor, p: float) -> Tensor:
    """Dropout whose mask takes 16 random bits an element; p is met to 1/65,536.

    The library draws a double for each element, one after the other: a tenth of a plain step. A
    comparison would give bytes, whose conversion takes longer than all of this."""
    dropped = round(p * 2**16)
    if not 0 < dropped < 2**16:
        return nn.functional.dropout(x, p)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    draws.random_(-(2**63), None)
    last = dropped - 2**15 - 1
    kept = draws.view(torch.int16)[: x.numel()].clamp_(last, last + 1).sub_(last)
    return x * kept.view(x.shape).to(x.dtype).mul_(2**16 / (2**16 - dropped))


class _CheapDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        if 0 < self.p < 1:
            return cheap_dropout(x, self.p) if self.training else x
        return super().forward(x)


def _cheap_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Packing | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    if packing is not None:
        query, key, value = map(packing.grid, (query, key, value))
    heads = query.shape[:2]
    bias = query.new_zeros(1)
    if attention_mask is not None:
        bias = attention_mask.to(query.dtype).expand(*heads, -1, -1).flatten(0, 1)
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))
    scaling = scaling or query.shape[-1] ** -0.5
    weights = torch.baddbmm(bias, query, key.mT, alpha=scaling).softmax(dim=-1)
    if dropout > 0:
        weights = cheap_dropout(weights, dropout)
    read = (weights @ value).unflatten(0, heads)
    return (read.transpose(1, 2) if packing is None else packing.line(read)), None


AttentionInterface.register(CHEAP, _cheap_attention)
AttentionMaskInterface.register(CHEAP, eager_mask)


@contextmanager
def cheap_dropout_in(backbone: PreTrainedModel) -> Iterator[None]:
    """Within this context a backbone on the CPU draws its dropout masks by `cheap_dropout`.

    That covers dropout layers, and the attention of architectures that let it be replaced."""
    if backbone.device.type != "cpu":
        yield
        return
    attention = backbone.config._attn_implementation
    layers = [layer for layer in backbone.modules() if type(layer) is nn.Dropout]
    for layer in layers:
        layer.__class__ = _CheapDropout
    if attention == "sdpa":
        backbone.set_attn_implementation(CHEAP)
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = nn.Dropout
        backbone.set_attn_implementation(attention)
