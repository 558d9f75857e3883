"""What goes with what: the README's table of methods, each pair of them trained or refused."""

import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from test_processes import METHODS as SHARED

from fcse import methods
from fcse.config import configured
from fcse.errors import InputError
from fcse.training import train

README = (Path(__file__).parents[1] / "README.md").read_text()
SMALL = {
    "cards": {"cards.k": 4},
    "debcse": {"debcse.k": 4, "debcse.teacher": "tf-idf"},
    "diffcse": {"diffcse.generator": "unigrams"},
    "fed_rcl": {"fed_rcl.rounds": 1, "fed_rcl.clients": 2, "fed_rcl.classes": "identity"},
    "ifnd": {"ifnd.clusters": 4, "ifnd.cluster_steps": 1},
    "sparse_cse": {"sparse_cse.batches": 2},
}
"""Settings by which a method is quick on a hundred sentences."""


def table():
    """Method -> the cells of its row: not beside, micro-batches, several processes."""
    part = README.partition("### What goes with what")[2].partition("\n#")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()]
    return {row[0].strip("`"): row[1:] for row in rows if len(row) == 4 and row[0][:1] == "`"}


def refused_pairs():
    """The pairs that the table says do not go together."""
    named = {name: re.findall(r"`(\w+)`", cells[0]) for name, cells in table().items()}
    return {frozenset((name, other)) for name, others in named.items() for other in others}


def names():
    """The methods but the schedule, which is none of a paper's."""
    return [name for name in methods.names() if name != "schedule"]


@pytest.fixture
def config(tiny_config, sentences, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    corpus = tmp_path / "hundred.txt"
    corpus.write_text("\n".join(sentences[:100]), encoding="utf-8")
    settings = {"objective": "info_nce", "steps": 2, "eval_steps": 2, "corpus": str(corpus)}
    return tiny_config(tmp_path / "run", **settings)


def given(*on):
    return {"objective": "+".join(on)} | {
        k: x for name in on for k, x in SMALL.get(name, {}).items()
    }


def test_every_method_has_its_row():
    assert sorted(table()) == names()


@pytest.mark.parametrize("pair", [*combinations(names(), 2)], ids="+".join)
def test_two_methods_train_together_or_are_refused_in_one_line(pair, config):
    if frozenset(pair) in refused_pairs():
        with pytest.raises(InputError) as refusal:
            train(configured(config, given("focal_info_nce", *pair)))
        assert "\n" not in str(refusal.value)
        return
    run = train(configured(config, given("focal_info_nce", *pair)))
    assert np.isfinite(run.losses).all()
    assert {method.key for method in run.config.methods} == {*pair}


@pytest.mark.parametrize("name", names())
def test_micro_batches_work_or_are_refused_as_the_table_says(name, config):
    micro = configured(config, given(name))
    if table()[name][1] != "yes":
        with pytest.raises(InputError, match="micro_batch_size"):
            replace(micro, micro_batch_size=3)
        return
    assert np.isfinite(train(replace(micro, micro_batch_size=3)).losses).all()


def test_methods_of_several_processes_are_tested_so():
    tested = {setting.partition(".")[0] for setting in SHARED if "." in setting} | {"sscl"}
    shared = {name for name, (_, _, cell) in table().items() if cell != "no"}
    assert shared - {"diffcse"} <= tested
