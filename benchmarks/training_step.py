"""Seconds of one float32 training step on the packaged encoder, against a plain loop's.

The peer is the step as it is usually written: tokenizer padding, one pass of the library's model
with both views, the same loss, clipping and optimiser. Levers join one by one; rounds alternate.

    python benchmarks/training_step.py
"""

import statistics
import time
from contextlib import nullcontext

import torch
from tqdm import tqdm

from fcse import losses, speed
from fcse.data import load_corpus
from fcse.encoder import SentenceEncoder

ROUNDS, STEPS, BATCH, LENGTH = 5, 1, 64, 32


def plain_views(encoder, token_ids):
    features = encoder.tokenizer.pad({"input_ids": token_ids * 2}, return_tensors="pt")
    hidden = encoder.backbone(**features).last_hidden_state[:, 0]
    return encoder.head(hidden).chunk(2)


def first_token_views(encoder, token_ids):
    with speed.first_token_only(encoder.backbone):
        return plain_views(encoder, token_ids)


VARIANTS = {
    "plain": (plain_views, nullcontext),
    "+ last layer for the first token": (first_token_views, nullcontext),
    "+ groups of similar length": (lambda encoder, ids: encoder(ids), nullcontext),
    "+ cheap dropout (as trained)": (lambda encoder, ids: encoder(ids), speed.cheap_dropout_in),
}


def main() -> None:
    torch.manual_seed(0)
    encoder = SentenceEncoder.from_pretrained("minilm").train()
    optimizer = torch.optim.AdamW(encoder.parameters(), 3e-5, weight_decay=0.0, fused=True)
    sentences = load_corpus("wiki-mini")
    batches = [sentences[i::300][:BATCH] for i in range(STEPS)]

    def steps(views, context) -> float:
        started = time.perf_counter()
        for batch in batches:
            ids = encoder.tokenize(batch, LENGTH)
            with context(encoder.backbone) if context is not nullcontext else nullcontext():
                u, v = views(encoder, ids)
            loss = losses.focal_info_nce(losses.similarity_matrix(u, v))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimizer.step()
        return (time.perf_counter() - started) / STEPS

    seconds = {name: [] for name in VARIANTS}
    for round_ in tqdm(range(ROUNDS + 1)):
        for name, variant in VARIANTS.items():
            took = steps(*variant)
            if round_:  # the first round warms up
                seconds[name].append(took)
    for name, took in seconds.items():
        ratios = [p / t for p, t in zip(seconds["plain"], took, strict=True)]
        print(
            f"{name:34}{statistics.median(took):6.2f} s/step   {statistics.median(ratios):.2f}x "
            f"plain ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
