"""One set of packages in environment.yml, constraints.txt and pyproject.toml; make's commands."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

from jupyterlab.handlers.announcements import NeverCheckForUpdate
from jupyterlab.labapp import LabApp
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(lines):
    found = (re.fullmatch(r"[\s-]*([\w.-]+)==([\w.]+)", line) for line in lines)
    return {canonicalize_name(m[1]): m[2] for m in found if m}


def requirements():
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


ENVIRONMENT = (ROOT / "environment.yml").read_text().splitlines()
CONSTRAINTS = pins((ROOT / "constraints.txt").read_text().splitlines())


def test_environment_pins_each_dependency_and_nothing_else():
    assert pins(ENVIRONMENT).keys() == requirements().keys()


def test_environment_equals_constraints_and_meets_the_ranges():
    for name, pin in pins(ENVIRONMENT).items():
        assert CONSTRAINTS[name] == pin
        assert requirements()[name].specifier.contains(pin), f"{name} {pin}"


def test_python_meets_the_range():
    (python,) = (m[1] for line in ENVIRONMENT if (m := re.search(r"- python=([\d.]+)", line)))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)


def made(target):
    """The words of each command that make runs for a target, once .venv is there."""
    make = ["make", "--dry-run", "--old-file=.venv/ready", target]
    # Below another make, which runs these tests, make would print the folders it enters too.
    own = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    run = subprocess.run(make, cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in run.stdout.replace("\\\n", "").splitlines()]


def test_make_lab_shows_no_news_and_asks_the_net_for_nothing():
    ((_, command, folder, *flags),) = made("lab")
    assert (command, folder) == ("lab", "notebooks")
    app = LabApp()
    app.parse_command_line(flags)
    assert app.news_url is None
    assert app.check_for_updates_class is NeverCheckForUpdate
    assert app.extension_manager == "readonly"
    ((plugin, settings),) = json.loads(
        (Path(app.app_settings_dir) / "overrides.json").read_text()
    ).items()
    package, name = plugin.split(":")
    schema = Path(sys.prefix) / "share/jupyter/lab/schemas" / package / f"{name}.json"
    known = json.loads(schema.read_text())["properties"]
    assert settings == {"fetchNews": "false", "checkForUpdates": False}
    assert settings.keys() <= known.keys()


def test_make_check_names_tests_that_are_there():
    *_, (_, *arguments) = made("check")
    files = [argument for argument in arguments if argument.endswith(".py")]
    assert len(files) > 10
    assert [file for file in files if not (ROOT / file).is_file()] == []
