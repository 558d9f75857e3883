"""A step's batch, and the comparison that its loss is computed from."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fcse import losses, processes
from fcse.config import TrainConfig
from fcse.encoder import speed
from fcse.encoder.precision import Precision
from fcse.encoder.sentence_encoder import SentenceEncoder
from fcse.errors import InputError
from fcse.methods import Batch, Comparison, Moments, Sentences, Start
from fcse.objectives import name
from fcse.training.corpora import TokenizedCorpus, token_hashes

Item = tuple[Sequence[int] | None, ...]
"""Token ids that a sentence of a batch brings: its own, those of its second view where that has
others, else None, and those of each further sentence that a method brought with it."""


def make_batch(
    config: TrainConfig,
    corpus: TokenizedCorpus,
    acting: dict[str, Moments],
    step: int,
    rows: np.ndarray,
) -> Batch:
    """The batch of a step (from 1) from B rows of the corpus, the same in all processes.

    acting: the methods of the run by their keys."""
    own = Sentences(rows, *corpus.batch(rows))
    batch = Batch(step, len(rows), own)
    parts = [own]
    for key, method in acting.items():
        brought = method.bring(batch)
        if brought and brought.second is not None:
            batch.second = brought.second
        if brought and brought.further is not None:
            batch.places[key] = sum(len(part.texts) for part in parts)
            parts.append(brought.further)
    batch.sentences = Sentences(
        np.concatenate([np.asarray(part.rows, np.int64) for part in parts]),
        [text for part in parts for text in part.texts],
        [ids for part in parts for ids in part.token_ids],
    )
    if config.mask_duplicates:
        batch.ids = torch.from_numpy(token_hashes(batch.sentences.token_ids))
        counts = batch.ids[: batch.size].unique(return_counts=True)[1]
        batch.masked_pairs = int((counts**2).sum()) - batch.size
    else:
        batch.ids = torch.arange(len(batch.sentences.texts))
    for method in acting.values():
        method.receive(batch)
    labels = (method.numbers(batch) for method in acting.values())
    batch.labels = tuple(x for x in labels if x is not None)
    return batch


def items(batch: Batch) -> list[Item]:
    """What each of the batch's sentences brings."""
    token_ids, size = batch.sentences.token_ids, batch.size
    second = batch.second or [None] * size
    further = [token_ids[start : start + size] for start in batch.places.values()]
    return list(zip(token_ids[:size], second, *further, strict=True))


def views(
    encoder: SentenceEncoder, layers: int, precision: Precision, part: Sequence[Item]
) -> tuple[Tensor, ...]:
    """The vectors of n items, row i from item i alone, after the head: u and v, (n, D) float each;
    with layers (n, 2 * layers, D); then (n, D) for each further sentence of an item."""
    token_ids, second, *further = zip(*part, strict=True)
    forward = speed.in_bf16(encoder) if precision == "bf16" else encoder
    return forward(token_ids, second if second[0] else None, layers, further)


def compare(batch: Batch, layers: int, u: Tensor, v: Tensor, *others: Tensor) -> Comparison:
    """This process' anchors against the columns of all, from what `views` gave of its items."""
    rest = [processes.gather_rows(x) for x in others]
    lower = rest.pop(0) if layers else None
    of = processes.own_first(torch.arange(batch.size)).to(v.device)
    return Comparison(
        batch=batch,
        token_ids=processes.share(batch.sentences.token_ids[: batch.size]),
        u=u,
        v=processes.gather_rows(v),
        of=of,
        ids=batch.ids.to(v.device)[of],
        always=torch.zeros(batch.size, dtype=torch.bool, device=v.device),
        lower=lower,
        brought=dict(zip(batch.places, rest, strict=True)),
    )


def loss_of(
    objective: Any, acting: Sequence[Moments], autocast: torch.autocast, compared: Comparison
) -> Tensor:
    """The loss of a comparison: the objective's, as the methods combine it, and theirs beside."""
    objective = _of_step(compared.batch.step, objective, acting)
    value: Callable[[Comparison], Tensor] = partial(_value, objective, acting)
    for method in reversed(acting):
        value = partial(method.loss, value)
    whole = value(compared)
    with autocast:
        beside = [method.beside(compared) for method in acting]
    return sum((x for x in beside if x is not None), start=whole)


def _value(objective: Any, acting: Sequence[Moments], compared: Comparison) -> Tensor:
    """The objective's own loss of a comparison."""
    own, own_of = compared.own or losses.NOTHING, compared.own_of
    ids = compared.numbers()
    if own_of is not None and ids is not None:
        own = losses.Own(own.negative, compared.numbers(own_of), own.positive)
    columns = losses.Columns(ids, _turns(acting, compared))
    return losses.chunked_loss(compared.u, compared.v, objective, columns, own)


def seen(
    config: TrainConfig, encoder: SentenceEncoder, sentences: Sequence[str]
) -> tuple[Any, losses.Columns]:
    """The objective and the columns by which a config's loss sees a matrix of these sentences.

    InputError: a method acts on more than the similarities of a batch."""
    for method in config.methods:
        if not method.by_matrix:
            raise InputError(
                f"{name(method)} acts on more than the similarities of a batch: its loss cannot be "
                "measured on a matrix alone"
            )
    acting = [method.begin(Start(config, encoder, None)) for method in config.methods]
    places, device = torch.arange(len(sentences)), encoder.device
    batch = Batch(1, len(sentences), Sentences(-np.ones(len(sentences)), sentences, []), ids=places)
    for method in acting:
        method.receive(batch)
    nothing = torch.zeros(len(sentences), 1, device=device)
    compared = Comparison(batch, [], nothing, nothing, places, places, places < 0)
    objective = _of_step(batch.step, config.objective, acting)
    return objective, losses.Columns(turns=_turns(acting, compared))


def _of_step(step: int, objective: Any, acting: Sequence[Moments]) -> Any:
    for method in acting:
        objective = method.objective(step, objective)
    return objective


def _turns(acting: Sequence[Moments], compared: Comparison) -> tuple[losses.Turn, ...]:
    return tuple(turn for method in acting if (turn := method.turn(compared)))
