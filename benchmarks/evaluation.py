"""Seconds for the whole STS suite, against the same work batch by batch in file order.

The peer encodes both sides of every pair in the order of the files, in batches of 128 (SentEval's
default) padded to their longest sentence, through plain `AutoModel`. Scores must agree.

FCSE_SENTEVAL=path/to/SentEval/data python benchmarks/evaluation.py
"""

import time

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from fcse.data import MINILM, STS_TASKS, SentencePairs, load_sts
from fcse.encoder import SentenceEncoder
from fcse.evaluation import aggregate_spearman, pair_similarities

BATCH_SIZE = 128
ROUNDS = 1


def main() -> None:
    tasks = [load_sts(task) for task in STS_TASKS]
    encoder = SentenceEncoder.from_pretrained("minilm")
    peer = InFileOrder()
    sentences = [s for pairs in tasks for s in (*pairs.left, *pairs.right)]
    print(
        f"{len(sentences):,} sentences, {len(set(sentences)):,} distinct, batches of {BATCH_SIZE}"
    )
    ratios = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        ours = scores(pair_similarities(encoder, tasks), tasks)
        between = time.perf_counter()
        theirs = scores([peer.similarities(pairs) for pairs in tasks], tasks)
        ended = time.perf_counter()
        ratios.append((ended - between) / (between - started))
        print(f"fcse       {between - started:7.1f} s")
        print(f"file order {ended - between:7.1f} s")
        print(f"ratio      {ratios[-1]:7.2f}x")
        print(f"largest difference of a score {np.abs(ours - theirs).max():.4f}")
    print(f"median ratio {np.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})")


def scores(similarities: list[np.ndarray], tasks: list[SentencePairs]) -> np.ndarray:
    return np.array([aggregate_spearman(*pair) for pair in zip(similarities, tasks, strict=True)])


class InFileOrder:
    def __init__(self) -> None:
        folder = MINILM.locate().parent
        self.model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def encode(self, sentences: list[str]) -> np.ndarray:
        batch = self.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        x = self.model(**batch).last_hidden_state[:, 0]
        return torch.nn.functional.normalize(x).numpy()

    def similarities(self, pairs: SentencePairs) -> np.ndarray:
        rows = []
        for start in range(0, len(pairs), BATCH_SIZE):
            u = self.encode(pairs.left[start : start + BATCH_SIZE])
            v = self.encode(pairs.right[start : start + BATCH_SIZE])
            rows.append((u * v).sum(axis=1))
        return np.concatenate(rows)


if __name__ == "__main__":
    main()
