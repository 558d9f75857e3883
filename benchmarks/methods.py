"""Seconds of a training step with each method, against plain InfoNCE in the same precision.

And of plain InfoNCE in float32, past all that a method could ask for, against a loop that knows
nothing of methods: encoder, loss, gradients and optimiser, written out. Rounds alternate;
preparations (searches, clusters, DiffCSE's generator, SparseCSE's first run) are not in a step, and
FedRCL is its two terms in one run.

    python benchmarks/methods.py
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from os import devnull
from pathlib import Path

import torch

from fcse import losses, methods
from fcse.config import configured
from fcse.data import load_corpus
from fcse.encoder import SentenceEncoder, speed
from fcse.recipes import recipe
from fcse.training import train

ROUNDS, STEPS, SENTENCES = 2, 5, 800
TOGETHER = "focal_info_nce+sscl+cards+ifnd"
FITTING = {
    "ifnd": {"ifnd.clusters": 50, "ifnd.cluster_steps": 100},
    "fed_rcl": {"fed_rcl.rounds": 0, "fed_rcl.classes": "identity"},
}
BARE, PLAIN = "the bare step, float32", "info_nce, float32"
CONFIG = replace(recipe("minilm-short"), batch_size=64, steps=STEPS + 1, eval_steps=100)


def between(ends: list[float]) -> float:
    return statistics.median(b - a for a, b in itertools.pairwise(ends))


def bare(sentences: list[str]) -> Callable[[], float]:
    encoder = SentenceEncoder.from_pretrained("minilm").train()
    optimizer = torch.optim.AdamW(encoder.parameters(), 3e-5, weight_decay=0.0, fused=True)
    batches = [encoder.tokenize(sentences[i::STEPS][:64], 32) for i in range(STEPS)]

    def seconds() -> float:
        ends = [time.perf_counter()]
        for token_ids in batches:
            optimizer.zero_grad()
            with speed.cheap_dropout_in(encoder.backbone):
                u, v = encoder(token_ids)
            losses.chunked_loss(u, v, "info_nce").backward()
            torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimizer.step()
            ends.append(time.perf_counter())
        return between(ends)

    return seconds


def trained(corpus: Path, objective: str) -> Callable[[], float]:
    name, _, precision = objective.partition(", ")
    settings = {"objective": name, "precision": precision or "auto"}
    for part in name.split("+"):
        settings |= FITTING.get(part, {})

    def seconds() -> float:
        ends: list[float] = []
        with tempfile.TemporaryDirectory() as folder, redirect_stderr(Path(devnull).open("w")):
            config = replace(CONFIG, corpus=str(corpus), output=folder + "/run")
            train(
                configured(config, settings),
                lambda step, encoder: ends.append(time.perf_counter()),
            )
        return between(ends)

    return seconds


def main() -> None:
    sentences = load_corpus("wiki-mini")
    sentences = sentences[:: len(sentences) // SENTENCES][:SENTENCES]
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        corpus.write_text("\n".join(sentences), encoding="utf-8")
        timed = {BARE: bare(sentences)}
        for name in (PLAIN, "info_nce", "focal_info_nce", *methods.names(), TOGETHER):
            timed[name] = trained(corpus, name)
        rounds = [{name: step() for name, step in timed.items()} for _ in range(ROUNDS)]
    print(
        f"batch {CONFIG.batch_size}, length {CONFIG.max_length}, {ROUNDS} rounds of {STEPS} steps"
    )
    for name in timed:
        peer = BARE if name in (BARE, PLAIN) else "info_nce"
        ratios = [took[name] / took[peer] for took in rounds]
        print(
            f"{name:42}{statistics.median(took[name] for took in rounds):7.3f} s/step   "
            f"{statistics.median(ratios):.2f}x {peer} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
