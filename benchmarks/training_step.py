"""Seconds of a training step on the packaged encoder, against sentence-transformers' trainer.

The peer is `SentenceTransformerTrainer` with `MultipleNegativesRankingLoss` on each sentence paired
with itself: the same encoder, readout, batch, length, optimiser and precision. Our step is timed
plain (tokenizer padding, one pass of the library's model with both views, under autocast in bf16)
and with the levers of `fcse.encoder` joining one by one; the last is what `fcse.training` does.
Rounds alternate.

    python benchmarks/training_step.py [float32|bf16]
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tqdm import tqdm
from transformers import TrainerCallback

from fcse import losses
from fcse.data import MINILM, load_corpus
from fcse.encoder import SentenceEncoder, speed

ROUNDS, STEPS, BATCH, LENGTH, RATE = 5, 2, 64, 32, 3e-5


def plain_views(encoder, token_ids):
    features = encoder.tokenizer.pad({"input_ids": token_ids * 2}, return_tensors="pt")
    features = features.to(encoder.device)
    hidden = encoder.backbone(**features).last_hidden_state[:, 0]
    return encoder.head(hidden).chunk(2)


def first_token_views(encoder, token_ids):
    with speed.first_token_only(encoder.backbone):
        return plain_views(encoder, token_ids)


def cheap_dropout_views(encoder, token_ids):
    with speed.cheap_dropout_in(encoder.backbone):
        return first_token_views(encoder, token_ids)


def in_bf16_views(encoder, token_ids):
    return speed.in_bf16(encoder)(token_ids)


def variants(precision):
    found = {
        "plain": plain_views,
        "+ last layer for the first token": first_token_views,
        "+ cheap dropout": cheap_dropout_views,
        "+ sentences end to end": lambda encoder, ids: encoder(ids),
    }
    if precision == "bf16":
        found["+ bf16 between the layers too"] = in_bf16_views
        found["+ freed memory kept"] = in_bf16_views
    return found


class Clock(TrainerCallback):
    """When each step ended: from one end to the next is a step with its data."""

    def on_train_begin(self, *_, **__):
        self.ends = []

    def on_step_end(self, *_, **__):
        synchronize()
        self.ends.append(time.perf_counter())


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peer(sentences: list[str], precision: str, folder: str) -> Callable[[], float]:
    transformer = Transformer(str(MINILM.locate().parent), max_seq_length=LENGTH)
    model = SentenceTransformer(modules=[transformer, Pooling(384, pooling_mode="cls")])
    pairs = Dataset.from_dict({"anchor": sentences, "positive": sentences})
    arguments = Arguments(
        folder,
        per_device_train_batch_size=BATCH,
        max_steps=STEPS + 1,
        learning_rate=RATE,
        bf16=precision == "bf16",
        # Without this the trainer takes bf16 for a GPU's, and stops where there is none.
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    loss = MultipleNegativesRankingLoss(model)

    def seconds() -> float:
        clock = Clock()
        SentenceTransformerTrainer(
            model, arguments, train_dataset=pairs, loss=loss, callbacks=[clock]
        ).train()
        return (clock.ends[-1] - clock.ends[0]) / STEPS

    return seconds


def ours(sentences: list[str], precision: str, name: str, views) -> Callable[[], float]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = SentenceEncoder.from_pretrained("minilm").train().to(device)
    optimizer = torch.optim.AdamW(encoder.parameters(), RATE, weight_decay=0.0, fused=True)
    cast = precision == "bf16" and views is not in_bf16_views
    kept = speed.freed_memory_kept if "memory" in name else nullcontext
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=cast)
    rows = torch.Generator().manual_seed(0)

    def seconds() -> float:
        with kept():
            return timed_steps()

    def timed_steps() -> float:
        synchronize()
        started = time.perf_counter()
        for _ in range(STEPS):
            batch = torch.randperm(len(sentences), generator=rows)[:BATCH].tolist()
            token_ids = encoder.tokenize([sentences[i] for i in batch], LENGTH)
            with autocast:
                u, v = views(encoder, token_ids)
            loss = losses.chunked_loss(u, v)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimizer.step()
        synchronize()
        return (time.perf_counter() - started) / STEPS

    return seconds


def main(precision: str = "float32") -> None:
    torch.manual_seed(0)
    sentences = load_corpus("wiki-mini")
    with tempfile.TemporaryDirectory() as folder:
        timed = {"sentence-transformers' trainer": peer(sentences, precision, folder)}
        for name, views in variants(precision).items():
            timed[name] = ours(sentences, precision, name, views)
        seconds = {name: [] for name in timed}
        for round_ in tqdm(range(ROUNDS + 1)):
            for name, step in timed.items():
                took = step()
                if round_:  # the first round warms up
                    seconds[name].append(took)
    theirs = next(iter(seconds.values()))
    print(f"{precision}, batch {BATCH}, length {LENGTH}, {ROUNDS} rounds of {STEPS} steps")
    for name, took in seconds.items():
        ratios = [p / t for p, t in zip(theirs, took, strict=True)]
        print(
            f"{name:34}{statistics.median(took):7.3f} s/step   {statistics.median(ratios):.2f}x "
            f"the peer ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
