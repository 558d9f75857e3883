"""environment.yml, constraints.txt and pyproject.toml name one and the same set."""

import re
import tomllib
from pathlib import Path

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
