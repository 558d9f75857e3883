"""Scores after 100 steps: our training in bf16 and in float32, and sentence-transformers' trainer.

All start from the packaged encoder and the same head, and see batches of 64 sentences of the
packaged corpus, each paired with itself, under the same loss (InfoNCE, temperature 0.05),
optimiser, schedule and length; the peer in float32. The weights are scored in float32 on Lee and,
where FCSE_SENTEVAL names the data, on STS-B's dev split. Two runs go on at a time, a thread each.
Our two precisions are paired by their seeds: head, order of the data and dropout are the same.

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
WHO = ("bf16", "float32", PEER)


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
            encoder = train(replace(CONFIG, precision=who, seed=seed, output=folder)).encoder
        metric = "stsb_dev" if os.environ.get("FCSE_SENTEVAL") else "last"
        return {"who": who} | score(encoder, judged_pairs(metric))


def main(seeds: int = 5) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as workers:
        jobs = [workers.submit(run, who, seed) for seed, who in product(range(seeds), WHO)]
        table = pd.DataFrame([job.result() for job in tqdm(jobs)])
    for task in ("lee", "stsb_dev"):
        if task in table:
            scores = {who: table[table["who"] == who][task].to_numpy() for who in WHO}
            for who, values in scores.items():
                print(f"{task}: {who} {values.mean():.2f} (sd {values.std(ddof=1):.2f})")
            low, ours, theirs = scores.values()
            paired = scipy.stats.ttest_rel(low, ours)
            two_samples = scipy.stats.ttest_ind(ours, theirs, equal_var=False)
            for name, gap, test in (
                ("bf16 - float32, paired", low - ours, paired),
                (f"float32 - {PEER}", ours.mean() - theirs, two_samples),
            ):
                interval = test.confidence_interval()
                print(
                    f"{task}: {name} {gap.mean():+.3f} "
                    f"(95 % interval {interval.low:+.3f} to {interval.high:+.3f}), {seeds} seeds"
                )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
