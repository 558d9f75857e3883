"""What is said of a study follows from its rows."""

import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from conftest import one_line_refusal

from fcse import analysis
from fcse.analysis import effects
from fcse.cli import main
from fcse.config import configured
from fcse.data import STS_TASKS
from fcse.encoder import SentenceEncoder
from fcse.losses import Columns
from fcse.methods.adap_acse import AdapACSE, turn
from fcse.methods.cards import CARDS
from fcse.methods.core_tuning import CoreTuning, FocalWeight
from fcse.objectives import FocalInfoNCE, HardnessInfoNCE, InfoNCE
from fcse.recipes import recipe
from fcse.statistics import detectable, holm, seeds_needed
from fcse.study import findings
from fcse.study.findings import DEV, chosen, contrasts, draw, means, pairs, read_study
from fcse.training import train

SEEDS = range(6)


def row(objective, seed, lift=0.0, **settings):
    """A row of a results table, its settings by their flat names."""
    config = configured(recipe("minilm-short"), {"objective": objective, "seed": seed} | settings)
    noise = np.random.default_rng([seed, len(config.corpus)]).normal(size=9)
    own = np.random.default_rng([seed, *config.name.encode()]).normal(size=9) / 4
    scores = zip((*STS_TASKS, "Lee", DEV), 70 + noise + own + lift, strict=True)
    return (
        {"run": f"{objective}-seed{seed}", "contestant": config.name}
        | config.settings
        | dict(scores)
    )


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
        row(objective, seed, lift, corpus=corpus, **settings)
        for corpus in ("wiki-mini", "other.txt")
        for seed in SEEDS
        for objective, lift, settings in (
            ("info_nce", 0, {}),
            ("info_nce", 0.5, {"temperature": 0.03}),
            ("focal_info_nce", 2, {}),
            ("focal_info_nce", -0.2, {"modulate": "positive"}),
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


PLAIN, FOCAL, COLD = "InfoNCE", "Focal-InfoNCE", "InfoNCE (temperature=0.03)"
HALF = "Focal-InfoNCE (modulate=positive)"


def test_rows_are_named_by_their_loss_and_have_the_mean_of_the_tasks(comparison):
    table = read_study(comparison)
    assert set(table["contestant"]) == {PLAIN, COLD, FOCAL, HALF}
    first = table.iloc[0]
    assert first["avg"] == pytest.approx(sum(first[task] for task in STS_TASKS) / 7)


def test_each_loss_is_compared_with_its_baselines():
    warm, cards = "Focal-InfoNCE (temperature=0.1)", "Focal-InfoNCE + CARDS (neighbours=4)"
    losses = ["Mine (a=1)", cards, "InfoNCE + SSCL", COLD, "Hardness-InfoNCE", HALF, warm, FOCAL]
    assert pairs([*losses, PLAIN, *losses]) == [
        *((PLAIN, FOCAL), (PLAIN, HALF), (PLAIN, "Hardness-InfoNCE")),
        *((PLAIN, warm), (PLAIN, COLD), (PLAIN, "Mine (a=1)")),
        *((COLD, FOCAL), (COLD, warm)),
        *((PLAIN, "InfoNCE + SSCL"), (FOCAL, cards)),
    ]


def test_contrasts_are_paired_and_corrected(comparison):
    table = read_study(comparison)
    compared = [(PLAIN, FOCAL), (PLAIN, HALF), (COLD, FOCAL)]
    found = contrasts(table, compared=[*compared, (PLAIN, "Hardness-InfoNCE")])
    assert len(found) == 2 * 2 * 3  # nobody ran the hardness weight
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
    focal = found[(found["contestant"] == FOCAL) & (found["score"] == "avg")]
    assert (focal["p_holm"] < 0.05).all()
    pd.testing.assert_frame_equal(
        contrasts(table), contrasts(table, compared=pairs(table["contestant"]))
    )


def test_a_star_marks_what_is_shown():
    rows = {"difference": [0.678, -1.0], "low": [0.54, -2], "high": [0.811, 0.02]}
    table = pd.DataFrame(rows | {"p_holm": [0.049, 0.05]}, index=[3, 1])
    assert findings.written(table).to_dict() == {
        3: "+0.68 (+0.54 to +0.81) *",
        1: "-1.00 (-2.00 to +0.02)",
    }


def test_the_setting_with_the_best_mean_is_chosen(write):
    rates = {"info_nce": 1e-4, "focal_info_nce": 5e-5}
    rows = [
        row(objective, seed, learning_rate=rate, lift=3 * (rate == rates[objective]))
        for objective in rates
        for rate in (2e-5, 5e-5, 1e-4)
        for seed in (100, 101)
    ]
    table = read_study(write("learning_rate", rows))
    found = chosen(table, ["learning_rate"])
    assert dict(zip(found["contestant"], found["learning_rate"], strict=True)) == {
        PLAIN: 1e-4,
        FOCAL: 5e-5,
    }
    assert list(found["contestant"]) == [PLAIN, FOCAL]
    for best in found.itertuples():
        same = table[
            (table["contestant"] == best.contestant)
            & (table["learning_rate"] == best.learning_rate)
        ]
        assert best.seeds == 2
        assert found.loc[best.Index, DEV] == pytest.approx(same[DEV].mean())


@pytest.mark.parametrize(
    ("contestant", "family"),
    [
        ("InfoNCE (temperature=0.03)", "InfoNCE"),
        ("Focal-InfoNCE (temperature=0.07, m=0.1)", "Focal-InfoNCE"),
        (
            "Focal-InfoNCE (temperature=0.1, m=0.2, modulate=negative, stop_gradient=True)",
            "Focal-InfoNCE (modulate=negative, stop_gradient=True)",
        ),
        ("Hardness-InfoNCE (alpha=3.0)", "Hardness-InfoNCE"),
        ("Focal-InfoNCE (modulate=positive)", "Focal-InfoNCE (modulate=positive)"),
        ("Mine (temperature=0.1)", "Mine (temperature=0.1)"),
        ("InfoNCE (temperature=0.1) + SSCL", "InfoNCE (temperature=0.1) + SSCL"),
    ],
)
def test_a_family_is_one_loss_with_all_its_temperatures(contestant, family):
    assert findings.family(contestant) == family


def test_a_choice_says_whether_it_lies_inside_what_was_tried(write):
    lift = {0.02: 0, 0.03: 2, 0.05: 1}
    rows = [
        row("info_nce", seed, lift[tau] - 3 * (rate != 1e-4), temperature=tau, learning_rate=rate)
        for seed in (100, 101)
        for tau, rate in ((0.02, 1e-4), (0.03, 1e-4), (0.05, 1e-4), (0.03, 5e-5), (0.05, 2e-4))
    ]
    table = read_study(write("choices", rows))
    settings = ["learning_rate", "temperature", "m"]

    def best(table):
        (found,) = chosen(table, settings, ("family",)).to_dict("records")
        return found["learning_rate"], found["temperature"], found["inside"]

    assert best(table) == (1e-4, 0.03, False)  # no higher rate at that temperature
    more = [row("info_nce", s, -1, temperature=0.03, learning_rate=3e-4) for s in (100, 101)]
    assert best(read_study(write("choices", rows + more))) == (1e-4, 0.03, True)
    assert best(table[table["learning_rate"] == 1e-4]) == (1e-4, 0.03, True)  # one rate was tried
    assert best(table[table["temperature"] > 0.02])[1:] == (0.03, False)


def test_the_tuned_baseline_has_the_temperature_of_its_length(write):
    rows = [
        row("info_nce", seed, steps=steps, temperature=tau)
        for seed in SEEDS
        for steps in (25, 100)
        for tau in (0.03, 0.05, 0.07)
    ] + [row("focal_info_nce", seed, 2, steps=steps) for seed in SEEDS for steps in (25, 100)]
    best = pd.DataFrame({"steps": [25, 100], "temperature": [0.05, 0.03]})
    table = read_study(write("lengths", rows))
    found = findings.with_tuned(table, best, "steps")
    assert set(found["contestant"]) == {PLAIN, FOCAL, findings.TUNED}
    for steps, tau in ((25, 0.05), (100, 0.03)):
        at = found[found["steps"] == steps]
        tuned = at[at["contestant"] == findings.TUNED].set_index("seed")[DEV]
        same = table[(table["temperature"] == tau) & (table["family"] == PLAIN)]
        expected = same[same["steps"] == steps].set_index("seed")[DEV]
        pd.testing.assert_series_equal(tuned, expected)
    by_steps = contrasts(found, [DEV], findings.SCALED, by="steps").set_index("steps")
    assert len(by_steps) == 6
    same = by_steps[by_steps["contestant"] == findings.TUNED]["difference"]
    assert same[25] == 0
    assert same[100] != 0


def test_the_detectable_difference_is_that_of_the_power(comparison):
    for line in contrasts(read_study(comparison)).itertuples():
        sd = line.difference / line.effect
        assert seeds_needed(line.detectable * 1.001, sd) == line.seeds
        assert seeds_needed(line.detectable * 0.999, sd) == line.seeds + 1
    with one_line_refusal("1 seed cannot show a difference"):
        detectable(1, 1)


@pytest.mark.parametrize("by", ["contestant", "objective"])
def test_means_keep_what_a_loss_does_not_have(by, write):
    rows = [
        row(objective, seed, temperature=tau)
        for objective in ("focal_info_nce", "info_nce")
        for tau in (0.03, 0.05)
        for seed in SEEDS
    ]
    table = read_study(write("surface", rows))
    found = means(table, ["temperature", "m"], by=by)
    assert (
        list(found[by])
        == {
            "contestant": [PLAIN, FOCAL, "Focal-InfoNCE (temperature=0.03)", COLD],
            "objective": ["info_nce"] * 2 + ["focal_info_nce"] * 2,
        }[by]
    )
    assert (found["m"].isna() == found[by].str.startswith(("Info", "info"))).all()
    for line in found.itertuples():
        same = table[(table[by] == getattr(line, by)) & (table["temperature"] == line.temperature)]
        assert line.seeds == len(same) == len(SEEDS)
        expected = same[DEV].agg(["mean", "min", "max"])
        assert [line.score, line.low, line.high] == pytest.approx(expected.tolist())


def of_a_batch(s, positive, negative, slope, titles):
    """`effects` without a resting point or InfoNCE, from numbers: (N, N) float each."""
    off = ~np.eye(len(s), dtype=bool)
    z = np.where(off, negative, positive)
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    p, s, slope = p[off], s[off], slope[off]
    pull = p * slope
    hardest = s >= np.sort(s)[-len(s) // 10 :][0]
    assert hardest.sum() == len(s) // 10
    same = np.equal.outer(titles, titles)[off]
    return {
        "effective_temperature": 1 / (pull.sum() / p.sum()),
        "hardest": np.abs(pull)[hardest].sum() / np.abs(pull).sum(),
        "towards": np.abs(pull[pull < 0]).sum() / np.abs(pull).sum(),
        "same_article": same[hardest].mean(),
        "same_article_pull": np.abs(pull)[same].sum() / np.abs(pull).sum(),
    }


@pytest.fixture
def s():
    return np.clip(np.random.default_rng(1).normal(0.3, 0.3, (20, 20)), -0.999, 0.999)


TITLES = np.array([f"article {i // 4}" for i in range(20)])


@pytest.mark.parametrize("m", [0.3, -0.6])
def test_the_effects_on_a_batch_against_numpy(m, s):
    found = effects(torch.tensor(s), TITLES, FocalInfoNCE(0.05, m))
    off = ~np.eye(20, dtype=bool)
    plain = np.exp(s / 0.05)
    plain = (plain / plain.sum(axis=1, keepdims=True))[off]
    hardest = s[off] >= np.sort(s[off])[-38]
    assert found == pytest.approx(
        of_a_batch(s, s * s / 0.05, s * (s + m) / 0.05, (2 * s + m) / 0.05, TITLES)
        | {
            "hardest_plain": plain[hardest].sum() / plain.sum(),
            "below": (s[off] < -m / 2).mean(),
        }
    )


@pytest.mark.parametrize("margin", [0.1, 0.4])
def test_the_effects_of_a_margin_are_those_of_the_turned_similarities(margin, s):
    teacher = np.random.default_rng(2).uniform(-0.2, 1, s.shape)
    columns = Columns(turns=(turn(margin, torch.tensor(teacher)),))
    found = effects(torch.tensor(s), TITLES, FocalInfoNCE(0.05, 0.3), columns)
    angle = np.arccos(s)
    moved = np.where(angle > margin, angle - (1 - teacher) * margin, angle)
    turned = np.cos(moved)
    slope = (2 * turned + 0.3) / 0.05 * np.sin(moved) / np.sin(angle)
    expected = of_a_batch(s, s * s / 0.05, turned * (turned + 0.3) / 0.05, slope, TITLES)
    expected["below"] = (turned < -0.15)[~np.eye(20, dtype=bool)].mean()
    del found["hardest_plain"]
    assert found == pytest.approx(expected)
    assert found["below"] > 0


@pytest.mark.parametrize(
    "objective", [InfoNCE(0.07), HardnessInfoNCE(0.07), FocalWeight(InfoNCE(0.07))]
)
def test_infonce_has_its_own_temperature_and_no_resting_point(objective):
    sim = torch.rand(12, 12, dtype=torch.float64) * 2 - 1
    found = effects(sim, ["a"] * 12, objective)
    assert found["effective_temperature"] == pytest.approx(0.07)
    assert found["below"] == found["towards"] == 0
    assert found["hardest_plain"] == pytest.approx(analysis.hardest_share(sim, InfoNCE(0.07)))
    assert found["same_article"] == found["same_article_pull"] == pytest.approx(1)


def test_random_batches_name_the_article_of_each_sentence():
    batches = findings.random_batches(2, 16)
    articles = findings.load_wiki_articles()
    assert [len(part) for batch in batches for part in batch] == [16] * 4
    for sentences, titles in batches:
        assert all(s in articles[title] for s, title in zip(sentences, titles, strict=True))
    assert batches == findings.random_batches(2, 16)
    assert batches != findings.random_batches(2, 16, seed=1)


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    """A run with the weights of steps 0, 1 and 2."""
    folder = tmp_path_factory.mktemp("run") / "focal"
    return train(tiny_config(folder, steps=2, eval_steps=1, checkpoints=True))


def test_along_training_the_run_s_own_loss_is_measured_with_its_methods(run, tiny_model):
    batches = findings.random_batches(2, 16)
    margin = AdapACSE(0.3, str(tiny_model("roberta")))
    config = replace(run.config, methods=(CoreTuning(mixing=False), margin))
    found = findings.along_training(replace(run, config=config), batches)
    assert list(found["step"]) == [0, 1, 2]
    assert set(found["seed"]) == {0}
    assert set(found["contestant"]) == {config.name}
    assert "AdapACSE (margin=0.3, teacher=" in config.name

    teacher = SentenceEncoder.from_pretrained(tiny_model("roberta"), "mean")
    for step in (0, 2):
        by_hand = []
        for sentences, titles in batches:
            sim = analysis.batch_similarities(run.encoder_at(step), sentences, 16)
            theirs = analysis.readout_similarities(teacher, sentences)
            columns = Columns(turns=(turn(0.3, theirs),))
            by_hand.append(effects(sim, titles, FocalWeight(FocalInfoNCE()), columns))
        expected = pd.DataFrame(by_hand).mean().to_dict()
        assert found.set_index("step").loc[step, list(expected)].to_dict() == pytest.approx(
            expected, rel=1e-4
        )
    without = findings.along_training(run, batches)
    assert (without["hardest"] != found["hardest"]).all()


@pytest.mark.parametrize("method", [CARDS(), CoreTuning()])
def test_what_acts_on_more_than_similarities_is_not_measured_along_training(method, run):
    other = replace(run, config=replace(run.config, methods=(method,)))
    with one_line_refusal(f"^{method.label}.* acts on more than the similarities of a batch"):
        findings.along_training(other, findings.random_batches(1, 8))


def test_a_study_is_taken_over_and_drawn(tiny_config, tmp_path, comparison, capsys):
    """From trained runs with checkpoints to tables and figures, through the command line."""
    study, runs = tmp_path / "figures", tmp_path / "runs"
    study.mkdir()
    for name in ("comparison", "states"):
        (study / f"{name}.toml").write_text("")
        (runs / name).mkdir(parents=True)
        (runs / name / "results.csv").write_bytes(comparison.read_bytes())
    (runs / "study").mkdir()
    scores = "encoder,task,score\nuntrained,Lee,47.4\nInfoNCE,Lee,51.4\n"
    (runs / "study/scores.csv").write_text(scores)
    for objective in ("info_nce", "focal_info_nce"):
        folder, kept = runs / "states/runs" / objective, {"checkpoints": True, "eval_steps": 1}
        train(tiny_config(folder, objective=objective, steps=4, **kept))

    main(["findings", str(study), "--runs", str(runs)])
    assert "p_holm" in capsys.readouterr().out
    along = pd.read_csv(study / "along_training.csv")
    assert along["step"].tolist() == [0, 1, 2, 3, 4] * 2
    plain = along[along["contestant"] == "InfoNCE"]
    assert plain["effective_temperature"].to_numpy() == pytest.approx(0.05)
    figures = {"gains.svg", "along_training.svg", "published.svg"}
    assert {path.name for path in study.glob("*.svg")} == figures
    before = {path: path.read_bytes() for path in study.iterdir()}
    main(["findings", str(study)])  # from the tables alone
    assert {path: path.read_bytes() for path in study.iterdir()} == before

    for weights in runs.glob("states/runs/*/checkpoints"):
        shutil.rmtree(weights)
    (runs / "study/scores.csv").write_text(f"{scores}InfoNCE,STS-B test,79.1\n")
    main(["findings", str(study), "--runs", str(runs)])  # with STS-B, and without weights
    now = {path.name: path.read_bytes() for path in study.iterdir()}
    new = now.keys() - {path.name for path in before}
    assert new == {"scores.csv", "scores.png", "scores.svg"}
    assert now["along_training.csv"] == before[study / "along_training.csv"]
    assert b"STS-B test: InfoNCE 79.1." in now["scores.svg"]


def test_every_picture_says_what_it_shows(write, comparison):
    folder = comparison.parent
    both = ("info_nce", "focal_info_nce")
    write("learning_rate", [row(v, s, learning_rate=r) for v in both
                            for s in (0, 1) for r in (2e-5, 5e-5)])  # fmt: skip
    write("method_rates", [row("sscl", 0, learning_rate=r, lift=r) for r in (2e-5, 5e-5)])
    write("surface", [row("info_nce", 0, temperature=t) for t in (0.03, 0.05, 0.1)]
          + [row("focal_info_nce", 0, temperature=t, m=m)
             for t in (0.03, 0.05) for m in (0, 0.3)])  # fmt: skip
    write("batch_size", [row("info_nce", s, batch_size=n) for s in (0, 1) for n in (16, 32)])
    write("second_corpus", [row(v, s, corpus="third.txt") for v in both for s in SEEDS])
    write(
        "methods",
        [row(v, s) for v in (*both, "sscl", "focal_info_nce+sscl", "ifnd+sscl") for s in SEEDS],
    )
    found = draw(folder)
    names = {"chosen", "learning_rate", "surface", "batch_size", "contrasts", "methods"}
    assert set(found) == names
    best = found["chosen"].set_index("contestant")["learning_rate"]
    assert set(best.index) == {PLAIN, FOCAL, "InfoNCE + SSCL"}
    assert best["InfoNCE + SSCL"] == 5e-5
    assert set(found["surface"]["objective"]) == {"info_nce", "focal_info_nce"}
    assert set(found["contrasts"]["corpus"]) == {"wiki-mini", "other.txt", "third.txt"}
    compared = found["methods"].groupby("score", sort=False)[["baseline", "contestant"]]
    assert [(score, rows.to_numpy().tolist()) for score, rows in compared] == [
        (score, [[PLAIN, FOCAL], [PLAIN, "InfoNCE + IFND + SSCL"], [PLAIN, "InfoNCE + SSCL"],
                 [FOCAL, "Focal-InfoNCE + SSCL"]])
        for score in ("STSBenchmark", "Lee")
    ]  # fmt: skip
    figures = ("by_learning_rate", "score_surface", "by_batch_size", "gains", "method_gains")
    for name in (*figures, "published"):
        assert "InfoNCE" in (folder / f"{name}.svg").read_text().partition("</title>")[0]
        assert len(pd.read_csv(folder / f"{name}.csv"))


def test_what_cannot_be_drawn_is_one_line(tmp_path):
    with one_line_refusal("holds no table of a study"):
        draw(tmp_path)
    with one_line_refusal("holds none of the grids"):
        findings.take_over(tmp_path, tmp_path)
    for content, said in (
        ("a,b\n1,2\n", "it has no column contestant"),
        ("a\n1,2\n1,2,3\n1,2,3,4\n", "tokenizing"),
        ("", "No columns"),
        ("run,variant,m\na,positive,0.3\n", "made by a version before 0.2.0: run the grid again$"),
    ):
        (tmp_path / "comparison.csv").write_text(content)
        with one_line_refusal(f"comparison.csv is no table of a study: .*{said}"):
            draw(tmp_path)
    with one_line_refusal("is no table of a study"):
        read_study(tmp_path / "nowhere.csv")
    (tmp_path / "comparison.csv").unlink()
    (tmp_path / "along_training.csv").write_text("name,step\nInfoNCE,0\n")
    with one_line_refusal("along_training.csv .* made by a version before 0.2.0"):
        draw(tmp_path)
