"""Scores after 100 steps: our training against sentence-transformers' trainer, over seeds.

Both start from the packaged encoder and the same head, and see batches of 64 sentences of the
packaged corpus, each paired with itself, under the same loss (InfoNCE, temperature 0.05),
optimiser, schedule, length and precision (float32). The weights are scored by the same code on Lee
and, where FCSE_SENTEVAL names the data, on STS-B's dev split. Two runs go on at a time, a thread
each.

    python benchmarks/equal_learning.py [SEEDS]
"""

import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product

import pandas as pd
import scipy.stats
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from torch import nn
from tqdm import tqdm

from fcse.data import MINILM, load_corpus
from fcse.encoder import SentenceEncoder
from fcse.evaluation import judged_pairs, score
from fcse.training import TrainConfig, train

CONFIG = TrainConfig(objective="info_nce", mask_duplicates=False, precision="float32")
PEER = "sentence-transformers"


def peer(seed: int, folder: str) -> SentenceEncoder:
    encoder = SentenceEncoder.from_pretrained(CONFIG.encoder, CONFIG.pooling, seed)
    transformer = Transformer(str(MINILM.locate().parent), max_seq_length=CONFIG.max_length)
    width = encoder.dimension
    head = Dense(width, width, activation_function=nn.Tanh())
    head.linear.load_state_dict(encoder.head[0].state_dict())
    model = SentenceTransformer(modules=[transformer, Pooling(width, pooling_mode="cls"), head])
    sentences = load_corpus(CONFIG.corpus)
    SentenceTransformerTrainer(
        model,
        Arguments(
            folder,
            seed=seed,
            per_device_train_batch_size=CONFIG.batch_size,
            max_steps=CONFIG.steps,
            learning_rate=CONFIG.learning_rate,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"anchor": sentences, "positive": sentences}),
        loss=MultipleNegativesRankingLoss(model, scale=1 / CONFIG.objective.temperature),
    ).train()
    encoder.backbone.load_state_dict(transformer.model.state_dict())
    return encoder.eval()


def run(who: str, seed: int) -> dict[str, float | str]:
    with tempfile.TemporaryDirectory() as folder:
        if who == PEER:
            encoder = peer(seed, folder)
        else:
            encoder = train(replace(CONFIG, seed=seed, output=folder)).encoder
        metric = "stsb_dev" if os.environ.get("FCSE_SENTEVAL") else "last"
        return {"who": who} | score(encoder, judged_pairs(metric))


def main(seeds: int = 5) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as workers:
        jobs = [
            workers.submit(run, who, seed) for seed, who in product(range(seeds), (PEER, "ours"))
        ]
        table = pd.DataFrame([job.result() for job in tqdm(jobs)])
    for task in ("lee", "stsb_dev"):
        if task in table:
            theirs, ours = (table[table["who"] == who][task] for who in (PEER, "ours"))
            interval = scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
            print(
                f"{task}: ours {ours.mean():.2f} (sd {ours.std():.2f}), {PEER} {theirs.mean():.2f} "
                f"(sd {theirs.std():.2f}), difference {ours.mean() - theirs.mean():+.2f} "
                f"(95 % interval {interval.low:+.2f} to {interval.high:+.2f}), {seeds} seeds"
            )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
