"""Each neighbour, and several at once, learns: real weights, real text, real human judgements."""

import os
from dataclasses import replace

import pytest

from fcse.data import load_corpus, load_sts
from fcse.evaluation import judge
from fcse.neighbours.options import SETTINGS
from fcse.recipes import recipe
from fcse.training import train

TOGETHER = {"objective": "focal_info_nce", "layers": 1, "neighbours": 8, "acceptance": 0.5}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Eight hundred sentences from all over the packaged corpus."""
    sentences = load_corpus("wiki-mini")
    path = tmp_path_factory.mktemp("corpus") / "wiki.txt"
    path.write_text("\n".join(sentences[:: len(sentences) // 800][:800]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def judged():
    """Every third pair of STS-B's dev split."""
    if not os.environ.get("FCSE_SENTEVAL"):
        pytest.skip("FCSE_SENTEVAL is not set: no STS data to score on")
    dev = load_sts("STSBenchmark", "dev")
    parts = (dev.left, dev.right, dev.gold, dev.subsets)
    left, right, gold, subsets = (part[::3] for part in parts)
    return replace(dev, left=left, right=right, gold=gold, subsets=subsets)


@pytest.fixture(scope="module")
def untrained(judged, minilm):
    return judge(minilm, judged)["spearman"]


@pytest.mark.parametrize(
    "settings",
    [*({"objective": name} for name in SETTINGS), TOGETHER],
    ids=lambda settings: settings["objective"],
)
def test_a_short_run_agrees_more_with_people(
    settings, corpus, judged, untrained, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("FCSE_SENTEVAL")  # else the run scores every pair twice, on its own
    short = replace(recipe("minilm-short"), steps=8, eval_steps=8, learning_rate=1e-4)
    data = {"corpus": str(corpus), "clusters": 50, "cluster_steps": 4}
    run = train(replace(short, **data, output=str(tmp_path / "run"), **settings))
    assert judge(run.encoder, judged)["spearman"] > untrained + 1
