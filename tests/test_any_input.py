"""Whatever a user gives, there is a result or one clear line: tried by the hundred."""

import json
import random
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fcse import methods
from fcse.cli import main
from fcse.config import PARAMETERS, TrainConfig, configured
from fcse.data import STS_SUBSETS, STS_TASKS, load_sts
from fcse.errors import InputError
from fcse.training import read_run, train

HUNDREDS = settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from([0, 1, 2, -1, 2**32, 1e300]))
WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["focal_info_nce", "both", "cls", "bf16", "lee", "minilm", ".", "/", "a/b/c"]),
)


def is_one_line(error):
    return bool(str(error)) and "\n" not in str(error)


def value_for(annotation):
    if "bool" in annotation:
        return st.booleans()
    return WORDS if "int" not in annotation and "float" not in annotation else NUMBERS


OWN = {f.name: value_for(str(f.type)) for f in fields(TrainConfig) if f.name != "methods"}
"""The fields that hold no values of classes, but for an objective by its name."""
FLAT = OWN | {
    name: value_for(str(f.type))
    for name, kind in PARAMETERS.items()
    for f in fields(kind)
    if f.name == name
}
FLAT |= {
    f"{key}.{f.name}": value_for(str(f.type))
    for key in methods.names()
    for f in fields(methods.method(key))
}
ANY = st.one_of(NUMBERS, WORDS, st.none(), st.booleans(), st.lists(NUMBERS, max_size=2))


def some_of(values):
    return st.dictionaries(st.sampled_from(sorted(values)), st.none(), max_size=4).flatmap(
        lambda chosen: st.fixed_dictionaries({name: values[name] for name in chosen})
    )


@HUNDREDS
@given(st.fixed_dictionaries({}, optional=OWN))
def test_any_fields(changes):
    try:
        config = TrainConfig(**changes)
    except InputError as error:
        assert is_one_line(error)
        assert any(name in str(error) for name in changes)
    else:
        assert config.name
        assert config.batch_size >= 2
        assert config.objective.temperature > 0


@HUNDREDS
@given(st.one_of(some_of(FLAT), some_of(dict.fromkeys(FLAT, ANY))))
def test_any_settings(changes):
    try:
        config = configured(TrainConfig(), changes)
    except InputError as error:
        assert is_one_line(error)
        assert any(name.partition(".")[0] in str(error) for name in changes)
    else:
        assert config.name
        assert config.batch_size >= 2
        assert config.objective.temperature > 0
        assert configured(TrainConfig(), config.settings).settings == config.settings


@HUNDREDS
@given(
    st.sampled_from(
        ["train", "evaluate", "compare", "report", "import", "study", "repeat", "doctor", ""]
    ),
    st.lists(
        st.one_of(
            WORDS,
            st.sampled_from([f"--{name.replace('_', '-')}" for name in FLAT]),
            st.sampled_from(["--tasks", "--json", "--help", "--resamples", "--aggregate", "-1"]),
        ),
        max_size=4,
    ),
)
def test_any_arguments(command, arguments):
    """None of them can begin to work: the encoder, or what is compared, is not there."""
    nowhere = {
        "train": ["--encoder=no/such/model/folder"],
        "evaluate": ["no/such/model/folder", "--tasks=Lee"],
        "compare": ["no/such/model/folder", "minilm"],
        "report": ["no/such/folder"],
        "import": ["no/such/checkpoint", "no/such/output"],
        "study": ["--figures=/dev/null/figures"],
        "repeat": ["no/such/table.csv", "no-such-run"],
        "doctor": ["--no-such-flag"],
    }
    with pytest.raises(SystemExit) as stop:
        main(
            [part for part in (command, *arguments, *nowhere.get(command, [])) if "\0" not in part]
        )
    assert stop.value.code in (0, 2)


LINES = st.lists(
    st.one_of(
        st.binary(max_size=30),
        st.text(max_size=30).map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.sampled_from(
            [
                b"A man plays.\tA man plays a guitar.",
                b"3.5",
                b"",
                b"nan",
                b"1e999",
                "שלום\tمرحبا".encode(),
                b"main-captions\tMSRvid\t2012test\t0001\t2.5\tA man.\tA woman.",
                b"1\tA dog.\tA cat.\t2.5\tENTAILMENT",
                b"\xef\xbb\xbf4.2",
            ]
        ),
    ),
    max_size=6,
).map(b"\n".join)


@HUNDREDS
@given(st.sampled_from(STS_TASKS), LINES, LINES)
def test_any_sts_folder(tmp_path_factory, task, texts, gold):
    folder = tmp_path_factory.mktemp("senteval")
    if task in STS_SUBSETS:
        where = folder / f"downstream/STS/{task}-en-test"
        where.mkdir(parents=True)
        for subset in STS_SUBSETS[task]:
            (where / f"STS.input.{subset}.txt").write_bytes(texts)
            (where / f"STS.gs.{subset}.txt").write_bytes(gold)
    else:
        for name in (
            "downstream/STS/STSBenchmark/sts-test.csv",
            "downstream/SICK/SICK_test_annotated.txt",
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(texts)
    try:
        pairs = load_sts(task, folder=folder)
    except InputError as error:
        assert is_one_line(error)
    else:
        assert len(pairs) == len(pairs.left) == len(pairs.right) == len(pairs.subsets) >= 1
        assert np.isfinite(pairs.gold).all()
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def finished(tiny_config, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "run"
    config = tiny_config(output, steps=2, eval_steps=1, checkpoints=True)
    return train(config)


def spoil(path, how, rng):
    if how == "remove":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size + 1)])
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "bytes":
        content = bytearray(path.read_bytes())
        for _ in range(rng.randrange(1, 8)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        path.write_bytes(content)
    elif how == "other JSON":
        path.write_text(json.dumps(rng.choice([None, [], 3, {"a": [1]}, {"config": 3}, "x"])))


@settings(HUNDREDS, max_examples=150)
@given(
    st.integers(0, 2**32),
    st.sampled_from(["remove", "cut", "folder", "empty", "bytes", "other JSON"]),
)
def test_any_damage_to_a_run(finished, tmp_path_factory, seed, how):
    rng = random.Random(seed)
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(finished.folder, folder)
    spoil(rng.choice(sorted(p for p in folder.rglob("*") if p.is_file())), how, rng)
    for use in (read_run, lambda path: train(replace(finished.config, output=str(path)))):
        try:
            assert use(folder).losses
        except InputError as error:
            assert is_one_line(error)
    shutil.rmtree(folder)
