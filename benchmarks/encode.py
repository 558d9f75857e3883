"""Seconds to embed 11,741 distinct STS sentences, against sentence-transformers' `encode`.

The peer reads the packaged encoder at its first token too, in float32, sorted by length as it
always does, in its own batches of 32. Ours runs in float32 and in bf16. Rounds alternate. Beside
the times: how far embeddings, cosines of pairs and the scores of the tasks move in bf16.

    FCSE_SENTEVAL=path/to/SentEval/data python benchmarks/encode.py [ROUNDS]
"""

import random
import statistics
import sys
import time

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from fcse.data import MINILM, STS_TASKS, load_lee, load_sts
from fcse.encoder import SentenceEncoder
from fcse.evaluation import aggregate_spearman, pair_similarities

SENTENCES = 11_741
PEER = "sentence-transformers"


def main(rounds: int = 3) -> None:
    tasks = [*(load_sts(task) for task in STS_TASKS), load_sts("STSBenchmark", "dev"), load_lee()]
    distinct = sorted({s for pairs in tasks[:7] for s in (*pairs.left, *pairs.right)})
    sentences = random.Random(0).sample(distinct, SENTENCES)
    encoder = SentenceEncoder.from_pretrained("minilm")
    peer = SentenceTransformer(
        modules=[Transformer(str(MINILM.locate().parent)), Pooling(384, pooling_mode="cls")],
        device=str(encoder.device),
    )
    ways = {
        PEER: lambda: peer.encode(sentences, show_progress_bar=False),
        "float32": lambda: encoder.encode(sentences),
        "bf16": lambda: encoder.encode(sentences, precision="bf16"),
    }
    seconds = {name: [] for name in ways}
    for way in ways.values():
        way()  # the first pass warms up
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    print(f"{len(sentences):,} sentences, {rounds} rounds")
    for name, took in seconds.items():
        ratios = [p / t for p, t in zip(seconds[PEER], took, strict=True)]
        print(
            f"{name:22}{statistics.median(took):7.2f} s   {statistics.median(ratios):.2f}x the "
            f"peer ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    x, y = (encoder.encode(sentences, normalize=True, precision=p) for p in ("float32", "bf16"))
    print(
        f"cosine of an embedding in bf16 with that in float32: 1 - {1 - (x * y).sum(1).min():.1e}"
    )
    whole, half = (pair_similarities(encoder, tasks, name) for name in ("float32", "bf16"))
    for pairs, x, y in zip(tasks, whole, half, strict=True):
        scores = [aggregate_spearman(similarity, pairs) for similarity in (x, y)]
        print(
            f"{pairs.name:22}{scores[0]:8.3f} in float32, {scores[1] - scores[0]:+.4f} in bf16; "
            f"cosines differ by {np.abs(x - y).mean():.1e} on average, {np.abs(x - y).max():.1e} "
            "at most"
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
