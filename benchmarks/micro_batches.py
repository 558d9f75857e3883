"""Peak memory and seconds of a step on one large batch, whole and in micro-batches.

Each measurement is a process of its own, so that one's peak is not the next one's start.

    python benchmarks/micro_batches.py
"""

import resource
import subprocess
import sys
import time

import torch

from fcse import losses
from fcse.data import load_corpus
from fcse.encoder import SentenceEncoder, speed
from fcse.training import micro_batches

BATCHES, MICRO, LENGTH = (256, 1024), 64, 32


def step(batch: int, micro: int) -> None:
    torch.manual_seed(0)
    encoder = SentenceEncoder.from_pretrained("minilm").train()
    optimizer = torch.optim.AdamW(encoder.parameters(), 3e-5, weight_decay=0.0, fused=True)
    token_ids = encoder.tokenize(load_corpus("wiki-mini", limit=batch), LENGTH)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()

    def views(part):
        with speed.cheap_dropout_in(encoder.backbone):
            return encoder(part)

    loss = micro_batches.backward(views, token_ids, micro, losses.chunked_loss)
    optimizer.step()
    took = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"batch {batch:5}, micro-batch {micro:5}: {took:6.1f} s, peak {after / 2**20:5.2f} GiB, "
        f"{before / 2**20:.2f} of it before the step, loss {loss:.4f}"
    )


def main() -> None:
    for batch in BATCHES:
        for micro in (batch, MICRO):
            subprocess.run([sys.executable, __file__, str(batch), str(micro)], check=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        step(*map(int, sys.argv[1:]))
    else:
        main()
