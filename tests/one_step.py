"""Loss, gradients and embeddings of one batch, whatever the number of processes."""

import torch
from safetensors.torch import save_file

from fcse import losses, processes
from fcse.encoder import SentenceEncoder
from fcse.losses import Columns
from fcse.training import micro_batches

LENGTH = 16


def one_step(model, sentences, micro_batch_size):
    encoder = SentenceEncoder.from_pretrained(model).train()
    token_ids = encoder.tokenize(sentences, LENGTH)
    numbers = {ids: i for i, ids in enumerate(sorted(set(map(tuple, token_ids))))}
    sentence_ids = torch.tensor([numbers[tuple(ids)] for ids in token_ids])

    def loss_of(u, v):
        columns = Columns(processes.own_first(sentence_ids))
        return losses.chunked_loss(u, processes.gather_rows(v), columns=columns)

    loss = micro_batches.backward(encoder, processes.share(token_ids), micro_batch_size, loss_of)
    processes.average_gradients(encoder.parameters())
    tensors = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    embeddings = torch.from_numpy(processes.encode(encoder, sentences[:-1]))
    return tensors | {"loss": processes.mean(loss), "embeddings": embeddings}


def save_step(model, sentences, micro_batch_size, file):
    """One of several processes: the first writes what all of them computed."""
    result = one_step(model, sentences, micro_batch_size)
    if processes.world().is_main_process:
        save_file(result, file)
