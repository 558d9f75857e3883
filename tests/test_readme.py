"""The numbers in the README are those of the figure beside them; the files it names exist."""

import io
import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from fcse.plots import NAMES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def committed(path):
    """A file as committed: `make study` writes this machine's numbers over it."""
    show = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True)
    if show.returncode:
        pytest.skip("not a git checkout: the committed figures are not known")
    return io.BytesIO(show.stdout)


def test_table_of_scores():
    header, _, *rows = re.search(r"\| encoder \|.*?(?=\n\n)", README, re.S)[0].splitlines()
    tasks = [cell.strip() for cell in header.strip("|").split("|")][1:]
    written = {}
    for row in rows:
        encoder, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        written[encoder] = dict(zip(tasks, map(float, cells), strict=True))
    scores = pd.read_csv(committed("figures/scores.csv"))
    assert {NAMES[key] for key in scores["encoder"]} == set(written)
    for _, row in scores.iterrows():
        assert written[NAMES[row["encoder"]]][row["task"]] == pytest.approx(row["score"], abs=0.051)


def test_files_named_exist():
    links = [x for x in re.findall(r"\]\(([^)#]+)\)", README) if not x.startswith("http")]
    assert links
    assert [x for x in links if not (ROOT / x).exists()] == []
