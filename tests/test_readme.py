"""The numbers in README and notebooks follow from the tables they are of; files named exist."""

import io
import re
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from scipy.stats import t

from fcse import findings, published
from fcse.config import TrainConfig
from fcse.neighbours.options import SETTINGS
from fcse.plots import NAMES, named
from fcse.statistics import seeds_needed

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def committed(path):
    """A file as committed: `make study` writes this machine's numbers over it."""
    show = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True)
    if show.returncode:
        pytest.skip("not a git checkout: the committed figures are not known")
    return io.BytesIO(show.stdout)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_of_scores():
    header, _, *rows = re.search(r"\| encoder \|.*?(?=\n\n)", README, re.S)[0].splitlines()
    tasks = cells(header)[1:]
    written = {}
    for row in rows:
        encoder, *scores = cells(row)
        written[encoder] = dict(zip(tasks, map(float, scores), strict=True))
    scores = pd.read_csv(committed("figures/scores.csv"))
    assert {NAMES[key] for key in scores["encoder"]} == set(written)
    for _, row in scores.iterrows():
        assert written[NAMES[row["encoder"]]][row["task"]] == pytest.approx(row["score"], abs=0.051)


def test_files_named_exist():
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", README) if not x.startswith("http")]
    assert links
    assert [x for x in links if not (ROOT / x).exists()] == []


def section(heading):
    (found,) = re.findall(rf"^{re.escape(heading)}\n(.*?)(?=^#)", README, re.S | re.M)
    return found


def table(text):
    """Rows of the first Markdown table of a section: first cell -> the others."""
    _, _, *lines = re.search(r"^\|.*?\|$(\n\|.*?\|$)*", text, re.M)[0].splitlines()
    return {name: row for name, *row in map(cells, lines)}


def prose(text):
    """The paragraphs of a section on one line, without tables, code, link targets and emphasis."""
    text = re.sub(r"^(```.*?^```|\|.*?)$", "", text, flags=re.S | re.M)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(text.replace("*", "").split())


def says_no_other_number(heading, expected):
    """The section's prose holds each of these sentences, and no number beside those in them."""
    left = prose(section(heading))
    for sentence in expected:
        assert sentence in left
        left = left.replace(sentence, "")
    assert not re.findall(r"[^ ]*\d[^ ]*", left), "numbers that nothing here recomputes"


@pytest.fixture(scope="module")
def rows():
    study = findings.STUDY
    return findings.read_study(study / "comparison.csv", study / "second_corpus.csv")


@pytest.fixture(scope="module")
def contrasts(rows):
    return findings.contrasts(rows, findings.PAIRS)


def test_table_of_contrasts(contrasts):
    # A column a score and corpus, in the order of the table.
    columns = [
        rows.assign(
            names=[f"{named(x.contestant)} − {named(x.baseline)}" for x in rows.itertuples()],
            written=findings.written(rows),
        ).set_index("names")["written"]
        for _, rows in contrasts.groupby(["score", "corpus"], sort=False)
    ]
    assert len(columns) == 4
    assert table(section("## What the study found")) == {
        name: list(row) for name, *row in pd.concat(columns, axis=1).itertuples()
    }


@pytest.fixture(scope="module")
def neighbour_rows():
    return findings.read_study(findings.STUDY / "neighbours.csv")


@pytest.fixture(scope="module")
def neighbours(neighbour_rows):
    return findings.contrasts(neighbour_rows, findings.NEIGHBOUR_PAIRS, ("STSBenchmark", "Lee"))


def test_table_of_neighbours(neighbours):
    found = findings.alone_and_beside(neighbours).loc[list(SETTINGS)]
    columns = [(score, way) for score in ("STSBenchmark", "Lee") for way in ("alone", "beside")]
    assert table(section("### Which of them help")) == {
        NAMES[name]: row.tolist() for name, row in found[columns].iterrows()
    }


@pytest.mark.parametrize("name", ["comparison", "second_corpus", "neighbours"])
def test_each_has_the_learning_rate_chosen_for_it(name):
    study = findings.STUDY
    searched = findings.read_study(*(study / f"{rates}.csv" for rates in findings.RATES))
    chosen = findings.chosen(searched, ["learning_rate"]).set_index("variant")["learning_rate"]
    used = findings.read_study(study / f"{name}.csv")
    assert not set(used["seed"]) & set(searched["seed"])
    for variant, rates in used.groupby("variant")["learning_rate"]:
        assert variant in chosen or "ifnd" in variant
        baseline = "focal_info_nce" if "focal_info_nce" in variant else "info_nce"
        assert set(rates) == {chosen.get(variant, chosen[baseline])}


def test_what_is_said_of_neighbours(neighbour_rows, neighbours):
    (steps,), (size,) = (neighbour_rows[column].unique() for column in ("steps", "batch_size"))
    (seeds,) = neighbours["seeds"].unique()
    expected = [
        f"trained for {steps} steps of {size} sentences",
        f"with {seeds} seeds each",
        f"correction for {len(neighbours) // 2} comparisons",
    ]
    says_no_other_number("### Which of them help", expected)

    told = neighbours[neighbours["p_holm"] < 0.05].set_index("score")
    gained = told[told["difference"] > 0]["contestant"]
    assert list(gained["STSBenchmark":"STSBenchmark"]) == ["focal_info_nce"]
    assert list(gained["Lee":"Lee"]) == ["focal_info_nce+core_tuning"]
    lost = neighbours.set_index(["score", "contestant"])["difference"]
    assert lost["STSBenchmark"].idxmin() == "core_tuning"
    lowest = {"cards", "focal_info_nce+cards", "focal_info_nce+sscl+cards+ifnd"}
    assert set(lost["Lee"].nsmallest(3).index) == lowest
    alone, beside = lost["STSBenchmark"][["cards", "focal_info_nce+cards"]]
    assert lost["STSBenchmark"][list(SETTINGS)].idxmax() == "cards"
    assert beside < 0 < alone
    alone, beside = lost["STSBenchmark"][["core_tuning", "focal_info_nce+core_tuning"]]
    assert alone < beside < 0
    found = findings.interactions(neighbour_rows, ["STSBenchmark"]).set_index("neighbour")
    assert set(found.index[found["p_holm"] < 0.05]) == {"cards", "core_tuning"}
    times = neighbour_rows.groupby("contestant")["wall_time_s"].mean()
    assert 8 < times["ifnd"] / times["info_nce"] < 12  # "ten times as slow"


def test_what_is_said_of_the_study(rows, contrasts):
    (steps,), (size,) = rows["steps"].unique(), rows["batch_size"].unique()
    by_name = rows.groupby("contestant")
    rates = by_name["learning_rate"].first()
    assert by_name["learning_rate"].nunique().eq(1).all()
    assert (rates.drop("positive") == rates["positive"] / 2).all()
    (tuned,) = rows.loc[rows["contestant"] == "info_nce tuned", "temperature"].unique()
    assert 40 < rows["wall_time_s"].mean() < 80  # "about a minute"
    by_pair = contrasts.set_index(["score", "baseline", "contestant"]).sort_index()
    for corpus in rows["corpus"].unique():
        found = by_pair[by_pair["corpus"] == corpus]["difference"]
        lead = found["avg", "info_nce", "focal_info_nce"]
        assert found["avg", "info_nce", "info_nce tuned"] > lead / 2  # "over half"
        assert found["avg", "info_nce"].idxmax() == "positive"  # "the highest mean"
    (family,) = contrasts.groupby(["score", "corpus"]).size().unique()
    bert = published.gains().set_index("backbone").loc["bert-base-uncased"]
    expected = [
        f"trained for {steps} steps of {size} sentences",
        f"with {rows['seed'].nunique()} seeds each",
        f"p < 0.05 after Holm's correction for {family} comparisons",
        f"τ = {tuned:g} in place of 0.05",
        "100 × Spearman, paired over seeds, with 95 % intervals",
        f"The published gain on BERT-base, {bert['gain']:.2f} points over published SimCSE, spans "
        f"{bert['gain_z']:.1f} standard deviations of 50 seeds of SimCSE",
    ]
    says_no_other_number("## What the study found", expected)


def test_what_is_said_of_published_scores():
    gains = published.gains()
    sd = gains["sd"]
    few = {1: "one", 2: "two", 3: "three", 4: "four"}
    within = few[(gains["gain_z"].abs() < 2).sum()]
    assert (
        f"50 seeds of SimCSE scatter with a standard deviation of {sd.min():.1f} to {sd.max():.1f} "
        f"points, and Focal-InfoNCE's published gain over published SimCSE is within two of them "
        f"on {within} of the {few[len(gains)]} backbones"
    ) in prose(section("## Is a difference real?"))


def test_numbers_that_the_notebook_on_seeds_quotes():
    """In its prose: those of its findings are printed by its cells, and nbval compares them."""
    gains = published.gains().set_index("backbone")
    bert = gains.loc["bert-base-uncased"]
    point = 97.5  # the upper end of a 95 % interval
    reach = {n: t.ppf(point / 100, n - 1) for n in (3, 5, 20)}
    near = (0.66, 0.67)
    expected = {
        f"{bert['focal_infonce']:.2f}",
        f"{bert['simcse']:.2f}",
        f"{TrainConfig.temperature:g}",
        f"{point}",
        *(f"{x:.2f}" for x in reach.values()),
        *(f"{reach[n] / n**0.5:.2f}" for n in (3, 5)),
        *map(str, near),
    }
    assert [seeds_needed(x, 1) for x in near] == [21, 20]
    cells = nbformat.read(ROOT / "notebooks/06_is_it_real.ipynb", 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert set(re.findall(r"\d+\.\d+", text)) == expected
