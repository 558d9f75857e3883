"""What is said of a study follows from its rows."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import one_line_refusal

from fcse import findings
from fcse.cli import main
from fcse.data import STS_TASKS
from fcse.findings import DEV, chosen, contrasts, draw, means, read_study, state
from fcse.recipes import recipe
from fcse.statistics import holm
from fcse.training import train

SEEDS = range(6)


def row(variant, seed, temperature=0.05, m=None, corpus="wiki-mini", learning_rate=5e-5, lift=0.0):
    rng = np.random.default_rng([seed, len(corpus)])
    noise = rng.normal(size=9)
    own = (
        np.random.default_rng([seed, *variant.encode(), round(1000 * temperature)]).normal(size=9)
        / 4
    )
    scores = dict(zip((*STS_TASKS, "Lee", DEV), 70 + noise + own + lift, strict=True))
    return {
        "run": f"{variant}-seed{seed}",
        "variant": variant,
        "encoder": "minilm",
        "corpus": corpus,
        "seed": seed,
        "steps": 25,
        "batch_size": 32,
        "temperature": temperature,
        "m": m,
        "learning_rate": learning_rate,
        **scores,
    }


@pytest.fixture
def write(tmp_path):
    def table(name, rows):
        path = tmp_path / f"{name}.csv"
        pd.DataFrame(rows).to_csv(path, index=False)
        return path

    return table


@pytest.fixture
def comparison(write):
    rows = [
        row(variant, seed, temperature, m, corpus, lift=lift)
        for corpus in ("wiki-mini", "other.txt")
        for seed in SEEDS
        for variant, temperature, m, lift in (
            ("info_nce", 0.05, None, 0),
            ("info_nce", 0.03, None, 0.5),
            ("focal_info_nce", 0.05, 0.3, 2),
            ("positive", 0.05, None, -0.2),
        )
    ]
    return write("comparison", rows)


def test_holm_against_its_definition():
    rng = np.random.default_rng(0)
    for n in range(1, 8):
        p = rng.uniform(size=n) ** 3
        adjusted = holm(p)
        for i in range(n):
            before = [j for j in range(n) if p[j] <= p[i]]
            worst = max(p[j] * (n - sum(p[k] < p[j] for k in range(n))) for j in before)
            assert adjusted[i] == pytest.approx(min(1, worst))
    assert holm([]) == []


def test_contestants_and_the_mean_of_the_tasks(comparison):
    table = read_study(comparison)
    assert set(table["contestant"]) == {"info_nce", "info_nce tuned", "focal_info_nce", "positive"}
    first = table.iloc[0]
    assert first["avg"] == pytest.approx(sum(first[task] for task in STS_TASKS) / 7)


def test_contrasts_are_paired_and_corrected(comparison):
    table = read_study(comparison)
    pairs = [
        ("info_nce", "focal_info_nce"),
        ("info_nce", "positive"),
        ("info_nce tuned", "focal_info_nce"),
    ]
    found = contrasts(table, [*pairs, ("info_nce", "negative")])
    assert len(found) == 2 * 2 * 3  # nobody ran "negative"
    for (score, corpus), family in found.groupby(["score", "corpus"]):
        rows = table[table["corpus"] == corpus].set_index(["contestant", "seed"])[score]
        assert family["p_holm"].tolist() == pytest.approx(holm(family["p"]))
        for line in family.itertuples():
            a, b = rows[line.baseline].sort_index(), rows[line.contestant].sort_index()
            difference = b - a
            test = scipy.stats.ttest_1samp(difference, 0)
            assert line.seeds == len(SEEDS)
            assert line.mean == pytest.approx(b.mean())
            assert line.difference == pytest.approx(difference.mean())
            assert line.p == pytest.approx(test.pvalue)
            assert (line.low, line.high) == pytest.approx(tuple(test.confidence_interval()))
            assert line.effect == pytest.approx(test.statistic / len(SEEDS) ** 0.5)
    focal = found[(found["contestant"] == "focal_info_nce") & (found["score"] == "avg")]
    assert (focal["p_holm"] < 0.05).all()


def test_interactions_are_differences_of_paired_gains(write):
    kinds = ("info_nce", "focal_info_nce", "sscl", "focal_info_nce+sscl", "ifnd")
    table = read_study(write("neighbours", [row(v, s) for v in kinds for s in SEEDS]))
    (found,) = findings.interactions(table, ["Lee"]).itertuples()  # ifnd ran alone only
    plain, focal, alone, both = (
        table[table["variant"] == v].sort_values("seed")["Lee"].to_numpy() for v in kinds[:4]
    )
    test = scipy.stats.ttest_1samp((both - focal) - (alone - plain), 0)
    assert (found.score, found.neighbour, found.seeds) == ("Lee", "sscl", len(SEEDS))
    assert found.mean == pytest.approx((both - focal).mean())
    assert found.difference == pytest.approx((both - focal - alone + plain).mean())
    assert (found.p, found.p_holm) == pytest.approx((test.pvalue, test.pvalue))
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval()))


def test_the_setting_with_the_best_mean_is_chosen(write):
    rates = {"info_nce": 1e-4, "focal_info_nce": 5e-5}
    rows = [
        row(variant, seed, learning_rate=rate, lift=3 * (rate == rates[variant]))
        for variant in rates
        for rate in (2e-5, 5e-5, 1e-4)
        for seed in (100, 101)
    ]
    table = read_study(write("learning_rate", rows))
    found = chosen(table, ["learning_rate"])
    assert dict(zip(found["variant"], found["learning_rate"], strict=True)) == rates
    assert list(found["variant"]) == ["info_nce", "focal_info_nce"]
    for best in found.itertuples():
        same = table[
            (table["variant"] == best.variant) & (table["learning_rate"] == best.learning_rate)
        ]
        assert best.seeds == 2
        assert found.loc[best.Index, DEV] == pytest.approx(same[DEV].mean())


def test_means_keep_what_a_variant_does_not_read(write):
    rows = [row("info_nce", seed, tau) for tau in (0.03, 0.05) for seed in SEEDS]
    rows += [row("focal_info_nce", seed, tau, 0.3) for tau in (0.03, 0.05) for seed in SEEDS]
    found = means(read_study(write("surface", rows)), ["temperature", "m"])
    assert len(found) == 4
    assert found["m"].isna().tolist() == [True, True, False, False]
    assert (found["low"] <= found["score"]).all()
    assert (found["score"] <= found["high"]).all()
    assert (found["seeds"] == len(SEEDS)).all()


@pytest.mark.parametrize("m", [0.3, -0.6])
def test_the_state_of_a_batch_against_numpy(m):
    rng = np.random.default_rng(1)
    s = np.clip(rng.normal(0.3, 0.3, (20, 20)), -1, 1)
    titles = [f"article {i // 4}" for i in range(20)]
    found = state(torch.tensor(s), titles, {"temperature": 0.05, "m": m})

    z = s * (s + m) / 0.05
    np.fill_diagonal(z, np.diag(s) ** 2 / 0.05)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    off = ~np.eye(20, dtype=bool)
    p, s_off = p[off], s[off]
    pull = p * (2 * s_off + m) / 0.05
    plain = np.exp(s / 0.05)
    plain = (plain / plain.sum(axis=1, keepdims=True))[off]
    hardest = s_off >= np.sort(s_off)[-len(s_off) // 10 :][0]
    assert hardest.sum() == len(s_off) // 10
    same = np.array([titles[i] == titles[j] for i in range(20) for j in range(20) if i != j])
    expected = {
        "effective_temperature": 0.05 / ((p * (2 * s_off + m)).sum() / p.sum()),
        "hardest": np.abs(pull)[hardest].sum() / np.abs(pull).sum(),
        "hardest_plain": plain[hardest].sum() / plain.sum(),
        "below": (s_off < -m / 2).mean(),
        "towards": np.abs(pull[pull < 0]).sum() / np.abs(pull).sum(),
        "same_article": same[hardest].mean(),
        "same_article_pull": np.abs(pull)[same].sum() / np.abs(pull).sum(),
    }
    assert found == pytest.approx(expected)


def test_infonce_has_its_own_temperature_and_no_resting_point():
    sim = torch.rand(12, 12, dtype=torch.float64) * 2 - 1
    found = state(sim, ["a"] * 12, {"objective": "info_nce", "temperature": 0.07})
    assert found["effective_temperature"] == pytest.approx(0.07)
    assert found["below"] == found["towards"] == 0
    assert found["hardest"] == pytest.approx(found["hardest_plain"])
    assert found["same_article"] == found["same_article_pull"] == pytest.approx(1)


def test_random_batches_name_the_article_of_each_sentence():
    batches = findings.random_batches(2, 16)
    articles = findings.load_wiki_articles()
    assert [len(part) for batch in batches for part in batch] == [16] * 4
    for sentences, titles in batches:
        assert all(s in articles[title] for s, title in zip(sentences, titles, strict=True))
    assert batches == findings.random_batches(2, 16)
    assert batches != findings.random_batches(2, 16, seed=1)


def test_a_study_is_taken_over_and_drawn(tiny_model, small_corpus, tmp_path, comparison, capsys):
    """From trained runs with checkpoints to tables and figures, through the command line."""
    study, runs = tmp_path / "figures", tmp_path / "runs"
    study.mkdir()
    for name in ("comparison", "states"):
        (study / f"{name}.toml").write_text("")
        (runs / name).mkdir(parents=True)
        (runs / name / "results.csv").write_bytes(comparison.read_bytes())
    tiny = {"encoder": str(tiny_model("bert")), "corpus": str(small_corpus), "batch_size": 8}
    config = replace(recipe("minilm-short"), **tiny, steps=4, eval_steps=1)
    for objective in ("info_nce", "focal_info_nce"):
        train(replace(config, objective=objective, output=runs / "states/runs" / objective))

    main(["findings", str(study), "--runs", str(runs)])
    assert "p_holm" in capsys.readouterr().out
    along = pd.read_csv(study / "along_training.csv")
    assert along["step"].tolist() == [0, 1, 2, 3, 4] * 2
    plain = along[along["contestant"] == "info_nce"]
    assert plain["effective_temperature"].to_numpy() == pytest.approx(0.05)
    assert {path.name for path in study.glob("*.svg")} == {"gains.svg", "along_training.svg"}
    before = {path: path.read_bytes() for path in study.glob("*.svg")}
    main(["findings", str(study)])  # from the tables alone
    assert {path: path.read_bytes() for path in before} == before


def test_every_picture_says_what_it_shows(write, comparison):
    folder = comparison.parent
    write("learning_rate", [row(v, s, learning_rate=r) for v in ("info_nce", "focal_info_nce")
                            for s in (0, 1) for r in (2e-5, 5e-5)])  # fmt: skip
    write("neighbour_rates", [row("sscl", 0, learning_rate=r, lift=r) for r in (2e-5, 5e-5)])
    write("surface", [row("info_nce", 0, t) for t in (0.03, 0.05, 0.1)]
          + [row("focal_info_nce", 0, t, m) for t in (0.03, 0.05) for m in (0, 0.3)])  # fmt: skip
    write("batch_size", [row("info_nce", s) | {"batch_size": n} for s in (0, 1) for n in (16, 32)])
    write("second_corpus", [row(v, s, corpus="third.txt") for v in ("info_nce", "focal_info_nce")
                            for s in SEEDS])  # fmt: skip
    kinds = ("info_nce", "sscl", "focal_info_nce", "focal_info_nce+sscl", "ifnd+sscl")
    write("neighbours", [row(v, s) for v in kinds for s in SEEDS])
    found = draw(folder)
    assert set(found) == {"chosen", "surface", "batch_size", "contrasts", "neighbours"}
    best = found["chosen"].set_index("variant")["learning_rate"]
    assert set(best.index) == {"info_nce", "focal_info_nce", "sscl"}
    assert best["sscl"] == 5e-5
    assert set(found["contrasts"]["corpus"]) == {"wiki-mini", "other.txt", "third.txt"}
    compared = found["neighbours"].groupby("score", sort=False)[["baseline", "contestant"]]
    assert [(score, rows.to_numpy().tolist()) for score, rows in compared] == [
        (score, [["info_nce", "focal_info_nce"], ["info_nce", "sscl"],
                 ["focal_info_nce", "focal_info_nce+sscl"]])
        for score in ("STSBenchmark", "Lee")
    ]  # fmt: skip
    figures = ("by_learning_rate", "score_surface", "by_batch_size", "gains", "neighbour_gains")
    for name in figures:
        assert "InfoNCE" in (folder / f"{name}.svg").read_text().partition("</title>")[0]
        assert len(pd.read_csv(folder / f"{name}.csv"))


def test_what_cannot_be_drawn_is_one_line(tmp_path, write):
    with one_line_refusal("holds no table of a study"):
        draw(tmp_path)
    with one_line_refusal("holds none of the grids"):
        findings.take_over(tmp_path, tmp_path)
    (tmp_path / "comparison.csv").write_text("a,b\n1,2\n")
    with one_line_refusal("is no table of a study"):
        draw(tmp_path)
    with one_line_refusal("is no table of a study"):
        read_study(tmp_path / "nowhere.csv")
