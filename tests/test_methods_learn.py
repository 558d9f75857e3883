"""Each method, and several at once, learns: real weights, real text, real human judgements."""

import os
from dataclasses import replace

import pytest

from fcse import methods
from fcse.config import configured
from fcse.data import load_corpus, load_sts, spread
from fcse.evaluation import judge
from fcse.recipes import recipe
from fcse.training import train

TOGETHER = "focal_info_nce+sscl+cards+ifnd"
FITTING = {
    # As many clusters as eight hundred sentences take.
    "ifnd": {"ifnd.clusters": 50, "ifnd.cluster_steps": 4},
    # A language model would be trained first, for minutes.
    "diffcse": {"diffcse.generator": "unigrams"},
    # Rows that are solved count next to nothing, and of 32 sentences most are.
    "core_tuning": {"batch_size": 64},
    # Four clients of two hundred sentences, in one round: a mean after each two steps moves little.
    "fed_rcl": {"fed_rcl.rounds": 1},
}
"""What a method needs to show in eight steps that it learns."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Eight hundred sentences from all over the packaged corpus."""
    path = tmp_path_factory.mktemp("corpus") / "wiki.txt"
    path.write_text("\n".join(spread(load_corpus("wiki-mini"), 800)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def judged():
    """Every fifth pair of STS-B's dev split."""
    if not os.environ.get("FCSE_SENTEVAL"):
        pytest.skip("FCSE_SENTEVAL is not set: no STS data to score on")
    dev = load_sts("STSBenchmark", "dev")
    parts = (dev.left, dev.right, dev.gold, dev.subsets)
    left, right, gold, subsets = (part[::5] for part in parts)
    return replace(dev, left=left, right=right, gold=gold, subsets=subsets)


@pytest.fixture(scope="module")
def untrained(judged, minilm):
    return judge(minilm, judged, "auto")["spearman"]


ANOTHER_WAY = {"core_tuning.way": "code"}


@pytest.mark.parametrize(
    ("objective", "more"),
    [*((name, {}) for name in (*methods.names(), TOGETHER)), ("core_tuning", ANOTHER_WAY)],
    ids=str,
)
def test_a_short_run_agrees_more_with_people(
    objective, more, corpus, judged, untrained, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FCSE_SENTEVAL")  # else the run scores every pair twice, on its own
    short = replace(recipe("minilm-short"), steps=8, eval_steps=8, learning_rate=1e-4)
    settings = {"objective": objective, "corpus": str(corpus), "score_precision": "auto"}
    for name in objective.split("+"):
        settings |= FITTING.get(name, {})
    settings |= more
    config = configured(short, settings)
    run = train(replace(config, output=str(tmp_path / "run")))
    assert judge(run.encoder, judged, "auto")["spearman"] > untrained + 1
