"""The numbers in the README follow from the tables they are of; the files it names exist."""

import io
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from fcse import findings, published
from fcse.plots import NAMES, named

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


def prose(text):
    """The paragraphs of a section on one line, without tables, code, link targets and emphasis."""
    text = re.sub(r"^(```.*?^```|\|.*?)$", "", text, flags=re.S | re.M)
    text = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(text.replace("*", "").split())


@pytest.fixture(scope="module")
def rows():
    return findings.read_study(ROOT / "figures/study/comparison.csv")


@pytest.fixture(scope="module")
def contrasts(rows):
    return findings.contrasts(rows, findings.PAIRS)


def test_table_of_contrasts(contrasts):
    _, _, *lines = re.findall(r"^\|.*\|$", section("## What the study found"), re.M)
    written = [cells(line) for line in lines]
    avg, lee = (contrasts[contrasts["score"] == score].itertuples() for score in ("avg", "Lee"))

    def cell(row):
        star = " *" if row.p_holm < 0.05 else ""
        return f"{row.difference:+.2f} ({row.low:+.2f} to {row.high:+.2f}){star}"

    assert written == [
        [f"{named(a.contestant)} − {named(a.baseline)}", cell(a), cell(b)]
        for a, b in zip(avg, lee, strict=True)
    ]


def test_what_is_said_of_the_study(rows, contrasts):
    (steps,), (size,) = rows["steps"].unique(), rows["batch_size"].unique()
    by_name = rows.groupby("contestant")
    rates = by_name["learning_rate"].first()
    assert by_name["learning_rate"].nunique().eq(1).all()
    assert (rates.drop("positive") == rates["positive"] / 2).all()
    (tuned,) = rows.loc[rows["contestant"] == "info_nce tuned", "temperature"].unique()
    found = contrasts.set_index(["score", "baseline", "contestant"])["difference"]
    share = found["avg", "info_nce", "info_nce tuned"] / found["avg", "info_nce", "focal_info_nce"]
    assert 0.5 < share < 0.67  # "over half"
    assert found["avg", "info_nce", "positive"] > found["avg", "info_nce", "focal_info_nce"]
    bert = published.gains().set_index("backbone").loc["bert-base-uncased"]
    expected = [
        f"trained for {steps} steps of {size} sentences",
        f"with {rows['seed'].nunique()} seeds each",
        f"p < 0.05 after Holm's correction for {(contrasts['score'] == 'avg').sum()} comparisons",
        f"τ = {tuned:g} in place of 0.05",
        "100 × Spearman, paired over seeds, with 95 % intervals",
        f"The published gain on BERT-base, {bert['gain']:.2f} points over published SimCSE, spans "
        f"{bert['gain_z']:.1f} standard deviations of 50 seeds of SimCSE",
    ]
    left = prose(section("## What the study found"))
    for sentence in expected:
        assert sentence in left
        left = left.replace(sentence, "")
    assert not re.findall(r"[^ ]*\d[^ ]*", left), "numbers that nothing here recomputes"


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
