"""Sentences end to end in one line, so that nothing but attention sees padding."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from transformers import PreTrainedModel

from fcse.losses import full_precision

CHEAP = "fcse_cheap"
"""The kit's own attention, by the name that the library knows it by."""

Embedding = Callable[[Tensor], Tensor]
"""(T,) token ids -> (T, D) float, their vectors."""

_LONGEST = 64
"""Tokens up to which attention over a padded sentence costs little beside the rest of a layer."""


def is_bert(backbone: PreTrainedModel) -> bool:
    """Whether a backbone is built as BERT and RoBERTa are."""
    return backbone.config.model_type in ("bert", "roberta") and not backbone.config.is_decoder


def packs(backbone: PreTrainedModel, token_ids: Sequence[Sequence[int]]) -> bool:
    """Whether `packed` is a way through a backbone for these sentences, and a cheap one."""
    fits = backbone.device.type == "cpu" and is_bert(backbone)
    ours = backbone.config._attn_implementation in ("sdpa", CHEAP)
    return fits and ours and max(map(len, token_ids)) <= _LONGEST


def packed(
    token_ids: Sequence[Sequence[int]], copies: int, backbone: PreTrainedModel, embedding: Embedding
) -> dict[str, Any]:
    """The backbone's inputs for n sentences end to end, all of them `copies` times."""
    packing = Packing([len(ids) for ids in token_ids] * copies, backbone.config.num_attention_heads)
    words = embedding(torch.tensor([token for ids in token_ids for token in ids]))
    filling = words.new_zeros(packing.length - copies * len(words), words.shape[1])
    padding = backbone.embeddings.position_embeddings.padding_idx
    return {
        "inputs_embeds": torch.cat([*[words] * copies, filling]).unsqueeze(0),
        "position_ids": packing.positions + (0 if padding is None else padding + 1),
        "attention_mask": packing.bias,
        "packing": packing,
    }


class Packing:
    """Where the tokens of n sentences stand: in a line, and in a grid (n, heads, m) for attention.

    The line is filled up with zeros to one of a few lengths, and m to a multiple of 8: the first
    matrix product of a new shape takes several times as long as the next ones.

    Attributes:
        length: of the line, T. positions: (1, T) int64, of each token within its sentence.
        first: (n,) int64, where each sentence begins.
        bias: (n, 1, 1, m) float32, 0 on tokens and far below 0 behind them."""

    def __init__(self, lengths: Sequence[int], heads: int) -> None:
        counts = torch.tensor(lengths)
        tokens, longest = int(counts.sum()), -(-max(lengths) // 8) * 8
        step = 1 << max(tokens.bit_length() - 5, 0)
        self.length = -(-tokens // step) * step
        self.first = counts.cumsum(0) - counts
        inside = torch.arange(longest) < counts.unsqueeze(1)
        sentence, column = inside.nonzero(as_tuple=True)
        self.positions = torch.zeros(1, self.length, dtype=torch.int64)
        self.positions[0, :tokens] = column
        self.bias = torch.where(inside, 0.0, -1e4)[:, None, None]
        head = torch.arange(heads)
        token = torch.where(inside, self.first.unsqueeze(1) + torch.arange(longest), 0)
        self._counts, self._sentence = counts, sentence
        self._shape = (len(lengths), heads, longest, -1)
        self._token_of_place = (token.unsqueeze(1) * heads + head.unsqueeze(1)).flatten()
        places = (sentence.unsqueeze(1) * heads + head) * longest + column.unsqueeze(1)
        self._place_of_token = places.flatten()

    def mean(self, line: Tensor) -> Tensor:
        """(1, T, D) -> (n, D): the mean over each sentence's tokens."""
        rows = full_precision(line[0, : len(self._sentence)])
        sums = rows.new_zeros(len(self.first), line.shape[2])
        sums = sums.index_add(0, self._sentence, rows)
        return (sums / self._counts.unsqueeze(1)).to(line.dtype)

    def grid(self, line: Tensor) -> Tensor:
        """(1, heads, T, d) -> (n, heads, m, d); behind a sentence's end stands some token's vector,
        whose gradient must be 0."""
        return _Grid.apply(line.transpose(1, 2).flatten(0, 2), self).view(self._shape)

    def line(self, grid: Tensor) -> Tensor:
        """(n, heads, m, d) -> (1, T, heads, d)."""
        heads, wide = self._shape[1], grid.shape[-1]
        return _Line.apply(grid.reshape(-1, wide), self).view(1, self.length, heads, wide)

    def _to_line(self, places: Tensor) -> Tensor:
        rows = places.new_empty(self.length * self._shape[1], places.shape[1])
        filled = len(self._place_of_token)
        torch.index_select(places, 0, self._place_of_token, out=rows[:filled])
        rows[filled:] = 0
        return rows


class _Grid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return rows.index_select(0, packing._token_of_place)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.packing._to_line(gradient), None


class _Line(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, places: Tensor, packing: Packing) -> Tensor:
        ctx.packing, ctx.shape = packing, places.shape
        return packing._to_line(places)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        places = ctx.packing._place_of_token
        grid = gradient.new_zeros(ctx.shape)
        return grid.index_copy_(0, places, gradient[: len(places)]), None
