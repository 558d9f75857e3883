"""Several processes as one: shared negatives, averaged gradients, sharded encoding.

Started by `accelerate launch` or `torchrun`, on GPUs (nccl) or CPUs (gloo); a single process passes
through every function unchanged. With P processes and B / P sentences in each, loss and gradients
are those of one process with B sentences."""

import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from fcse.encoder.precision import Precision
from fcse.encoder.sentence_encoder import SentenceEncoder


def world() -> PartialState:
    """Who this process is among how many, and its device; joined on the first call."""
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return PartialState(cpu=launched and not torch.accelerator.is_available())


def leave() -> None:
    """Part from the other processes once all are here: one that just ends can make them abort."""
    state = world()
    state.wait_for_everyone()
    state.destroy_process_group()


def share(rows: Sequence) -> Sequence:
    """This process' part of a global batch whose length the number of processes divides."""
    state = world()
    size = len(rows) // state.num_processes
    return rows[state.process_index * size : (state.process_index + 1) * size]


def own_first(x: Tensor) -> Tensor:
    """The rows of a global batch (B, ...) turned so that this process' own come first."""
    state = world()
    return x.roll(-state.process_index * (len(x) // state.num_processes), 0)


def gather_rows(x: Tensor) -> Tensor:
    """Every process' rows (B / P, D) as (B, D), own first; gradients flow back to their owners.

    The authors' code gathers without gradients, so that a sentence of another process is pushed
    away from but never moves itself."""
    if world().num_processes == 1:
        return x
    return own_first(torch.cat(all_gather(x.contiguous())))


def mean(x: Tensor) -> Tensor:
    """The mean of a tensor over the processes."""
    return reduce(x, "mean")


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one exchange."""
    if world().num_processes == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    vector_to_parameters(mean(parameters_to_vector(gradients)), gradients)


def encode(
    encoder: SentenceEncoder, sentences: Sequence[str], precision: Precision = "float32"
) -> np.ndarray:
    """Unit-length embeddings (n, D) float32; every process encodes its share and gets them all.

    All processes must call it, with the same sentences."""
    state = world()
    share = sentences[state.process_index :: state.num_processes]
    mine = encoder.encode(share, normalize=True, precision=precision)
    embeddings = np.empty((len(sentences), mine.shape[1]), dtype=np.float32)
    for index, part in enumerate(gather_object([mine])):
        embeddings[index :: state.num_processes] = part
    return embeddings
