"""The numbers in README and notebooks follow from the tables they are of; what it shows works."""

import functools
import io
import re
import shlex
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from scipy.stats import t

import fcse.training
from fcse.cli import _parse
from fcse.config import TrainConfig
from fcse.methods.schedule import Schedule
from fcse.objectives import InfoNCE
from fcse.statistics import seeds_needed
from fcse.study import findings, published

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def committed(path):
    """A file as committed: `fcse findings --runs` writes this machine's numbers over it."""
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
    scores = pd.read_csv(committed("figures/study/scores.csv"))
    assert set(scores["encoder"]) == set(written)
    for _, row in scores.iterrows():
        assert written[row["encoder"]][row["task"]] == pytest.approx(row["score"], abs=0.051)


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
    return findings.contrasts(rows)


def test_table_of_contrasts(contrasts):
    # A column a score and corpus, in the order of the table.
    columns = [
        rows.assign(
            names=rows["contestant"] + " − " + rows["baseline"],
            written=findings.written(rows),
        ).set_index("names")["written"]
        for _, rows in contrasts.groupby(["score", "corpus"], sort=False)
    ]
    assert len(columns) == 4
    assert table(section("## What the study found")) == {
        name: list(row) for name, *row in pd.concat(columns, axis=1).itertuples()
    }


def test_the_schedule_holds_the_temperatures_that_were_measured():
    along = pd.read_csv(findings.STUDY / "along_training.csv")
    focal = along[along["contestant"] == "Focal-InfoNCE"].groupby("step")
    measured = focal["effective_temperature"].mean()
    assert len(set(measured.index.diff().dropna())) == 1, "states at equal distances"
    assert Schedule().values == pytest.approx(measured.tolist(), abs=5e-5)


TUNED = "InfoNCE (temperature=0.025)"


@pytest.mark.parametrize("table", ["comparison", "second_corpus"])
def test_each_has_the_learning_rate_chosen_for_it(table):
    study = findings.STUDY
    searched = findings.read_study(study / "learning_rate.csv")
    chosen = findings.chosen(searched, ["learning_rate"]).set_index("contestant")["learning_rate"]
    used = findings.read_study(study / f"{table}.csv")
    assert not set(used["seed"]) & set(searched["seed"])
    for name, rates in used.groupby("contestant")["learning_rate"]:
        assert name in chosen or name == TUNED
        baseline = "InfoNCE" if name == TUNED else findings.alone(name)
        assert set(rates) == {chosen[name if name in chosen else baseline]}


def test_what_is_said_of_the_study(rows, contrasts):
    (steps,), (size,) = rows["steps"].unique(), rows["batch_size"].unique()
    by_name = rows.groupby("contestant")
    rates = by_name["learning_rate"].first()
    assert by_name["learning_rate"].nunique().eq(1).all()
    positive = "Focal-InfoNCE (modulate=positive)"
    assert (rates.drop(positive) == rates[positive] / 2).all()
    (temperature,) = rows.loc[rows["contestant"] == TUNED, "temperature"].unique()
    assert 40 < rows["wall_time_s"].mean() < 80  # "about a minute"
    by_pair = contrasts.set_index(["score", "baseline", "contestant"]).sort_index()
    for corpus in rows["corpus"].unique():
        found = by_pair[by_pair["corpus"] == corpus]["difference"]
        lead = found["avg", "InfoNCE", "Focal-InfoNCE"]
        assert found["avg", "InfoNCE", TUNED] > lead / 2  # "over half"
        assert found["avg", "InfoNCE"].idxmax() == positive  # "the highest mean"
    (family,) = contrasts.groupby(["score", "corpus"]).size().unique()
    bert = published.gains().set_index("backbone").loc["bert-base-uncased"]
    expected = [
        f"trained for {steps} steps of {size} sentences",
        f"with {rows['seed'].nunique()} seeds each",
        f"p < 0.05 after Holm's correction for {family} comparisons",
        f"temperature={temperature:g}` is the best temperature found for InfoNCE, in place of "
        f"{InfoNCE.temperature:g}, the paper's",
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
        f"{InfoNCE.temperature:g}",
        f"{point}",
        *(f"{x:.2f}" for x in reach.values()),
        *(f"{reach[n] / n**0.5:.2f}" for n in (3, 5)),
        *map(str, near),
    }
    assert [seeds_needed(x, 1) for x in near] == [21, 20]
    cells = nbformat.read(ROOT / "notebooks/06_is_it_real.ipynb", 4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert set(re.findall(r"\d+\.\d+", text)) == expected


def python(text):
    """The one Python block of a text."""
    (found,) = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    return found


def test_every_command_is_one():
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    shell = "".join(block for language, block in blocks if not language)
    lines = [line for line in shell.splitlines() if line.startswith("fcse ")]
    assert len(lines) > 15
    for line in lines:
        _, *arguments = shlex.split(line, comments=True)
        assert callable(_parse(arguments))


@pytest.fixture
def tiny_runs(tiny_model, small_corpus, tmp_path, monkeypatch):
    """What an example trains is tiny, and lies in a folder of its own."""
    monkeypatch.setenv("FCSE_RUNS", str(tmp_path))
    tiny = {"encoder": str(tiny_model("bert")), "corpus": str(small_corpus)}
    tiny |= {"batch_size": 8, "steps": 2, "eval_steps": 2, "max_length": 16}
    monkeypatch.setattr(fcse.training, "TrainConfig", functools.partial(TrainConfig, **tiny))


def test_a_loss_of_your_own_trains_as_written(tiny_runs):
    found = {"__name__": "__main__"}
    exec(python(section("## A loss of your own")), found)
    assert found["run"].config.name == "CubedNegatives (temperature=0.1)"
    assert len(found["run"].losses) == 2


def test_the_method_in_contributing_trains_as_written(tiny_runs, tmp_path):
    exec(python((ROOT / "CONTRIBUTING.md").read_text()), {"__name__": "__main__"})
    (run,) = [fcse.training.read_run(path) for path in tmp_path.iterdir() if path.is_dir()]
    assert run.config.name == "Focal-InfoNCE + Cooling"
