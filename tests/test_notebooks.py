"""The notebooks as files: their pictures have words, their parameters act, wrong outputs show."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from fcse.training import train

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def notebook(start):
    (path,) = [path for path in NOTEBOOKS if path.name.startswith(start)]
    return path


def text(path):
    """What the code cells of a notebook printed and returned, as text."""
    outputs = [o for cell in nbformat.read(path, 4).cells for o in cell.get("outputs", [])]
    return "".join(o.get("text", "") or o.get("data", {}).get("text/plain", "") for o in outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_stored_picture_has_a_text_alternative(path):
    cells = nbformat.read(path, 4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert pictures
    for picture in pictures:
        alt = picture.metadata["image/png"]["alt"]
        assert len(alt) > 60
        assert '<img style="max-width: 100%; height: auto" alt="' in picture.data["text/html"]


@pytest.fixture
def tiny_runs(tiny_config, tmp_path):
    """A folder with seeds 0 and 1 of both losses, trained for two steps."""
    runs = tmp_path / "runs"
    for seed in (0, 1):
        for objective in ("info_nce", "focal_info_nce"):
            changes = {"seed": seed, "objective": objective, "steps": 2, "eval_steps": 1}
            train(tiny_config(runs / f"{objective}-seed{seed}", recipe="minilm-short", **changes))
    return runs


def test_a_command_line_runner_sets_the_parameters(tiny_runs, tmp_path, monkeypatch):
    # The run that notebook 6 trains whatever its parameters is loaded where nbval trained it.
    monkeypatch.setenv("FCSE_RUNS", os.environ.get("FCSE_RUNS", str(tmp_path / "short")))
    seeds, source = tmp_path / "06.ipynb", tiny_runs / "info_nce-seed1"
    papermill.execute_notebook(
        notebook("06"), seeds, {"RUNS": str(tiny_runs), "SEEDS": [0, 1]}, progress_bar=False
    )
    assert "seeds of each loss: 2 2" in text(seeds)
    plane = tmp_path / "04.ipynb"
    papermill.execute_notebook(notebook("04"), plane, {"SOURCE": str(source)}, progress_bar=False)
    (alt,) = [
        output.metadata["image/png"]["alt"]
        for cell in nbformat.read(plane, 4).cells
        for output in cell.get("outputs", [])
        if "Uniformity across" in output.get("metadata", {}).get("image/png", {}).get("alt", "")
    ]
    assert "InfoNCE: uniformity from" in alt
    assert "over 2 steps" in alt
    assert "Focal" not in alt


@pytest.mark.parametrize("wrong", [False, True])
def test_a_wrong_stored_output_makes_the_check_fail(wrong, tmp_path):
    checked = nbformat.read(notebook("06"), 4)
    printed = ["".join(o.get("text", "") for o in c.get("outputs", [])) for c in checked.cells]
    first = next(i for i, text in enumerate(printed) if "True" in text)
    del checked.cells[first + 1 :]  # the published numbers: nothing is trained
    codes = [cell for cell in checked.cells if cell.cell_type == "code"]
    (printed,) = codes[-1].outputs
    if wrong:
        printed.text = printed.text.replace("True", "False", 1)
    nbformat.write(checked, tmp_path / "head.ipynb")
    check = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", "head.ipynb"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert check.returncode == wrong, check.stdout
    assert (f"FAILED head.ipynb::Cell {len(codes) - 1}" in check.stdout) == wrong
    assert f"{len(codes) - wrong} passed" in check.stdout
