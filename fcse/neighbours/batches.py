"""What a batch offers a loss beside its sentences, made only where a setting asks for it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fcse import processes
from fcse.config import TrainConfig
from fcse.corpora import TokenizedCorpus
from fcse.data import cache_folder
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError, first_line, writing
from fcse.neighbours import case, clusters, retrieval
from fcse.runs import versions, weights_hash

_CHUNK = 8192
"""Sentences of the corpus that are embedded at a time."""


class Item(NamedTuple):
    """What one sentence of a batch brings: tokens each, of what is not asked for None.

    token_ids: of the sentence. second: of its second view, where that has other tokens.
    retrieved: of the sentence that joins as a further negative.
    """

    token_ids: Sequence[int]
    second: Sequence[int] | None = None
    retrieved: Sequence[int] | None = None


@dataclass(frozen=True)
class Mixing:
    """What `losses.core_tuning` mixes by, its arguments of these names, (N,) each."""

    positive_weight: Tensor
    negative_weight: Tensor
    negative_columns: Tensor


@dataclass(frozen=True)
class Batch:
    """A step's batch of N sentences: columns are those, then N retrieved ones where there are.

    sentences: N strings. items: N, in their order. sentence_ids: (G, columns) int64, see
    `losses.logits`, or None where no two are the same. masked_pairs: pairs of the N that are the
    same sentence. teacher: (columns, E) float32, the teacher's embeddings, or None. mixing: the
    draws of a step, or None.
    """

    sentences: list[str]
    items: list[Item]
    sentence_ids: Tensor | None
    masked_pairs: int
    teacher: Tensor | None
    mixing: Mixing | None


class Batches:
    """Makes each step's `Batch` from rows of the corpus, whatever step a run goes on from.

    Attributes:
        labels: (n,) int64, the pseudo-label of every sentence of the corpus, -1 for none; None
            before the first clustering. With these, seed and step decide a batch.
    """

    def __init__(
        self, config: TrainConfig, encoder: SentenceEncoder, corpus: TokenizedCorpus
    ) -> None:
        """Prepare what does not change from step to step.

        Raises:
            InputError: mixing over several processes, more layers than the encoder has, more
                neighbours or clusters than the corpus has sentences for, case switching with an
                uncased vocabulary, or a teacher that is not there.
        """
        self.config = config
        self.corpus = corpus
        self.tokenize = encoder.tokenize
        self.labels: np.ndarray | None = None
        self._neighbours = self._teacher = None
        if config.option("case_switch"):
            case.require_cased(encoder.tokenizer)
        if config.option("mixing") and processes.world().num_processes > 1:
            raise InputError("mixing needs a batch in one process: set mixing to false")
        most = encoder.backbone.config.num_hidden_layers - 1
        if config.option("layers") > most:
            raise InputError(
                f"layers must be at most {most}, those below the last of this encoder, "
                f"got {config.option('layers')}"
            )
        if config.option("acceptance") and config.clusters > len(corpus):
            raise InputError(
                f"clusters must be at most {len(corpus)}, the sentences of the corpus, "
                f"got {config.clusters}"
            )
        if config.option("margin"):
            teacher = SentenceEncoder.from_pretrained(config.teacher, "mean")
            self._teacher = teacher.eval().to(processes.world().device)
        if k := config.option("neighbours"):
            self._neighbours = _nearest(encoder, corpus, k)

    def cluster(self, step: int, encoder: SentenceEncoder) -> None:
        """Renew the labels where it is time to, before a step is taken."""
        config = self.config
        acceptance = config.option("acceptance")
        every = config.cluster_steps or min(200, max(1, config.steps // 4))
        if acceptance and step > 1 and (step - 1) % every == 0:
            share = clusters.accepted(step - 1, config.steps, acceptance)
            embeddings = embed(encoder, self.corpus)
            self.labels = clusters.pseudo_labels(embeddings, config.clusters, share, config.seed)

    def at(self, step: int, rows: np.ndarray) -> Batch:
        """The batch of a step.

        Args:
            step: from 1.
            rows: (N,) integers, rows of the corpus.
        """
        config = self.config
        sentences, token_ids = self.corpus.batch(rows)
        ids, masked = number(token_ids) if config.mask_duplicates else (None, 0)
        second: Sequence[Sequence[int] | None] = [None] * len(rows)
        if share := config.option("case_switch"):
            switched = case.switched(sentences, share, config.seed, step)
            second = self.tokenize(switched, config.max_length)
        retrieved: Sequence[Sequence[int] | None] = [None] * len(rows)
        columns, texts = rows, sentences
        if self._neighbours is not None:
            drawn = retrieval.drawn(self._neighbours, rows, config.seed, step)
            more, retrieved = self.corpus.batch(drawn)
            columns, texts = np.concatenate([rows, drawn]), [*sentences, *more]
            if config.mask_duplicates:
                ids, _ = number([*token_ids, *retrieved])
        groups = [] if ids is None else [ids]
        if self.labels is not None:
            labels = torch.from_numpy(self.labels[columns.astype(np.int64)])
            groups.append(labels.where(labels >= 0, -1 - torch.arange(len(labels))))
        teacher = self._teacher and torch.from_numpy(processes.encode(self._teacher, texts))
        return Batch(
            sentences,
            [Item(*parts) for parts in zip(token_ids, second, retrieved, strict=True)],
            torch.stack(groups) if groups else None,
            masked,
            teacher,
            self._mixing(step, len(rows)) if config.option("mixing") else None,
        )

    def _mixing(self, step: int, size: int) -> Mixing:
        # The 3 keeps this stream apart from those of `retrieval.drawn` and `case.switched`.
        generator = np.random.default_rng((3, self.config.seed, step))
        positive, negative = torch.from_numpy(generator.beta(1, 1, (2, size))).float()
        others = generator.integers(1, size, size)
        return Mixing(positive, negative, torch.from_numpy((np.arange(size) + others) % size))


def number(token_ids: Sequence[Sequence[int]]) -> tuple[Tensor | None, int]:
    """A number for each distinct sentence of a batch, (N,) int64, and how many pairs share one.

    Sentences are the same where the encoder cannot tell them apart; None where all are distinct.
    """
    numbers: dict[tuple[int, ...], int] = {}
    ids = torch.tensor([numbers.setdefault(tuple(ids), len(numbers)) for ids in token_ids])
    if len(numbers) == len(ids):
        return None, 0
    return ids, int((ids.bincount() ** 2).sum()) - len(ids)


def embed(encoder: SentenceEncoder, corpus: TokenizedCorpus) -> np.ndarray:
    """Unit-length embeddings of a whole corpus, (n, D) float16: 2 D bytes a sentence."""
    embeddings = np.empty((len(corpus), encoder.dimension), dtype=np.float16)
    for start in range(0, len(corpus), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(corpus)))
        embeddings[rows] = processes.encode(encoder, corpus.batch(rows)[0])
    return embeddings


def _nearest(encoder: SentenceEncoder, corpus: TokenizedCorpus, k: int) -> np.ndarray:
    """`retrieval.nearest` of a corpus by this encoder, kept for the next run that asks for it."""
    decides = [corpus.sha256, weights_hash(encoder.backbone), encoder.pooling, k, versions()]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]
    path = cache_folder() / f"neighbours-{digest}.npy"
    world = processes.world()
    found = path.is_file()
    world.wait_for_everyone()  # all have looked before the first one writes
    if found:
        try:
            return np.load(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({first_line(error)}): delete it") from None
    ids = np.empty(len(corpus), dtype=np.int64)
    for start in range(0, len(corpus), _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, len(corpus)))
        for row, tokens in zip(rows, corpus.batch(rows)[1], strict=True):
            short = hashlib.blake2b(np.asarray(tokens, np.int32).tobytes(), digest_size=8)
            ids[row] = int.from_bytes(short.digest(), "little", signed=True)
    neighbours = retrieval.nearest(embed(encoder, corpus), k, ids, encoder.device)
    if world.is_main_process:
        with writing(path.parent, "name another folder with XDG_CACHE_HOME, or make room"):
            partial = path.with_suffix(".partial.npy")
            np.save(partial, neighbours)
            partial.rename(path)
    return neighbours
