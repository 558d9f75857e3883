"""The rooms of fcse import each other as the table in CONTRIBUTING.md says, and stay small."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fcse"
FILES = sorted(PACKAGE.rglob("*.py"))

MOST_ENTRIES = 18
MOST_LINES = 11_999
MOST_LINES_OF_A_FILE = 500


def table():
    """Room -> those that it may import, from CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| `([\w./]+)` \|[^|]*\|([^|]*)\|$", text, re.M)
    assert len(dict(rows)) == len(rows), "a room has two rows"
    return {room: re.findall(r"`([\w./]+)`", allowed) for room, allowed in rows}


def entries():
    """What lies at the top of fcse/, folders with a slash behind."""
    found = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    return sorted(f"{path.name}/" if path.is_dir() else path.name for path in found)


def room(path):
    """The entry at the top of fcse/ that a file belongs to."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) == 1 else f"{parts[0]}/"


def file_of(dotted):
    """The file of a module of fcse, None where there is no such module."""
    path = ROOT.joinpath(*dotted.split("."))
    found = [path.with_suffix(".py"), path / "__init__.py"]
    return next((file for file in found if file.is_file()), None)


def imported(source, path):
    """Every file of fcse that a file imports, wherever in it the import stands."""
    package = [*path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (file_of(alias.name) for alias in node.names if _ours(alias.name))
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            if _ours(module):
                for alias in node.names:
                    yield file_of(f"{module}.{alias.name}") or file_of(module)


def _ours(module):
    return module.split(".")[0] == "fcse"


@pytest.fixture(scope="module")
def imports():
    """File -> the files of fcse that it imports."""
    found = {path: set(imported(path.read_text(), path)) for path in FILES}
    assert None not in set().union(*found.values()), "an import of what is not there"
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from fcse import losses", ["losses.py"]),
        ("from fcse import __version__, plots", ["__init__.py", "plots/__init__.py"]),
        ("import fcse.study.grid as g", ["study/grid.py"]),
        ("def f():\n    from fcse.encoder import speed", ["encoder/speed.py"]),
        ("if TYPE_CHECKING:\n    from fcse.losses import Own", ["losses.py"]),
        ("from fcse.encoder import SentenceEncoder", ["encoder/__init__.py"]),
        ("from . import sscl", ["methods/sscl.py"]),
        ("from .sscl import SSCL", ["methods/sscl.py"]),
        ("from ..losses import loss", ["losses.py"]),
        ("import torch\nfrom fcsettings import x", []),
    ],
)
def test_every_kind_of_import_is_seen(source, expected):
    found = imported(source, PACKAGE / "methods/cards.py")
    assert list(found) == [PACKAGE / name for name in expected]


def test_each_room_has_its_row():
    assert sorted(table()) == entries()


def test_rooms_import_what_their_row_lists(imports):
    allowed = table()
    wrong = [
        f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
        for path, others in imports.items()
        for other in others
        if room(other) not in (room(path), "__init__.py", *allowed[room(path)])
    ]
    assert wrong == []


def test_rooms_and_files_are_in_no_circle(imports):
    one_way(table())
    within = defaultdict(dict)
    for path, others in imports.items():
        within[room(path)][path] = {other for other in others if room(other) == room(path)} - {path}
    for files in within.values():
        one_way(files)


def one_way(graph):
    """Raise CycleError, which names the circle, where there is one."""
    TopologicalSorter(graph).prepare()


def test_the_table_names_no_room_that_is_none():
    allowed = table()
    assert {other for others in allowed.values() for other in others} <= set(allowed)


def test_settings_need_no_torch():
    heavy = "{'torch', 'transformers', 'pandas', 'gensim'} & set(sys.modules)"
    code = (
        f"import sys, fcse.recipes, fcse.methods as m; [*map(m.method, m.names())]; print({heavy})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_few_entries():
    assert len(entries()) <= MOST_ENTRIES


def test_files_are_short():
    lines = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in FILES}
    assert {path: n for path, n in lines.items() if n > MOST_LINES_OF_A_FILE} == {}


def test_the_whole_stays_small():
    assert sum(len(path.read_text().splitlines()) for path in FILES) <= MOST_LINES
