"""The command line: what it offers, what it writes, and one clear line for what is wrong."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import matplotlib.font_manager  # noqa: F401 - keeps a list of fonts, not in a test's own cache
import pytest
import torch
from conftest import lee_score
from own_process import flags
from transformers import AutoModel

from fcse import cli
from fcse.data import load_lee
from fcse.encoder import SentenceEncoder
from fcse.methods.cards import CARDS
from fcse.methods.core_tuning import CoreTuning
from fcse.methods.ifnd import IFND
from fcse.methods.sscl import SSCL
from fcse.objectives import FocalInfoNCE, HardnessInfoNCE, InfoNCE
from fcse.recipes import recipe
from fcse.study.report import load_runs, over_seeds, score_runs

FLAGS = [
    *("recipe", "objective", "encoder", "corpus", "temperature", "m", "modulate", "pooling"),
    *("batch-size", "steps", "learning-rate", "seed", "precision", "output", "alpha"),
    *("sscl.layers", "cards.k", "cards.case-switch", "diffcse.detection"),
    *("adap-acse.margin", "adap-acse.teacher", "ifnd.acceptance", "ifnd.cluster-steps"),
]
SWITCHES = ["stop-gradient", "mask-duplicates", "checkpoints"]
SWITCHES += ["core-tuning.focal-weight", "core-tuning.mixing"]


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    """Whatever a command writes lands in a folder of the test's own."""
    monkeypatch.setenv("FCSE_RUNS", str(tmp_path / "runs"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def corpus(tmp_path, sentences):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(sentences[:60]), encoding="utf-8")
    return str(path)


def run(*arguments):
    """Exit code of the command line, run in this process."""
    try:
        cli.main(arguments)
    except SystemExit as stop:
        return stop.code or 0
    return 0


def tree(folder):
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


COMMANDS = [
    *("train", "evaluate", "compare", "report", "import"),
    *("study", "repeat", "findings", "doctor"),
]


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command, capsys):
    assert run(*command, "--help") == 0
    assert capsys.readouterr().out.startswith("usage: fcse")


HEAVY = {"torch", "transformers", "accelerate", "datasets", "gensim", "umap", "scipy.stats"}
TABLES, PICTURES = {"pandas", "pyarrow", "scipy.stats"}, {"matplotlib", "seaborn", "IPython"}
HEAVY |= {"sklearn"} | TABLES | PICTURES
EACH = """
import json, sys
from fcse import cli
loaded = {}
for line in sys.argv[1:]:
    try:
        cli.main(line.split())
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    loaded[line] = [code, *sys.modules]
print(json.dumps(loaded), file=sys.stderr)
"""


def heavy(*lines):
    """The exit code of each command line, and the slow modules that were loaded up to there.

    All run in one process, which has imported nothing but the command line."""
    command = [sys.executable, "-c", EACH, *lines]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = json.loads(done.stderr.splitlines()[-1])
    return {line: (code, HEAVY & {*modules}) for line, (code, *modules) in loaded.items()}


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        (0, ["--help", *(f"{name} --help" for name in COMMANDS)]),
        (2, ["", "fly", "evaluate", "train --no-such-flag 1", "train --sscl.layer 1"]),
        (2, ["train --steps abc", "train --temperature 0", "train --modulate all"]),
        (2, ["train --objective none_such", "train --recipe none-such", "train --layers 1"]),
        (2, ["evaluate minilm --pooling max", "evaluate minilm --tasks STS99"]),
        (2, ["evaluate minilm --json none/scores.json", "compare minilm minilm --resamples 3"]),
        (2, ["study --workers 2"]),
    ],
)
def test_help_and_the_parsers_errors_wait_for_nothing_slow(code, lines):
    assert heavy(*lines) == dict.fromkeys(lines, (code, set()))


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("report none", TABLES),
        ("study --config none.toml", TABLES),
        ("findings none", TABLES | PICTURES),
    ],
)
def test_tables_wait_for_no_torch(line, allowed):
    code, loaded = heavy(line)[line]
    assert code == 2
    assert loaded <= allowed


def test_doctor_loads_torch_alone():
    assert heavy("doctor")["doctor"][1] == {"torch"}


def test_train_help_names_the_fields(capsys):
    run("train", "--help")
    shown = capsys.readouterr().out
    assert [flag for flag in FLAGS if f"--{flag} " not in shown] == []
    assert [flag for flag in SWITCHES if f"--{flag}, " not in shown] == []


def test_help_shows_the_defaults_of_the_recipe_named(capsys):
    run("train", "--recipe", "roberta-base-focal", "--help")
    shown = capsys.readouterr().out
    assert "(default: roberta-base)" in shown
    assert "512" in shown


def bad_file(path, content):
    path.write_bytes(content)
    return str(path)


def short_gold(folder):
    folder.mkdir(parents=True)
    bad_file(folder / "STS.input.MSRpar.txt", b"a b\tc d\n" * 3)
    bad_file(folder / "STS.gs.MSRpar.txt", b"1\n2\n")


BAD = {
    "no such corpus": lambda d: ["train", "--corpus", str(d / "none.txt")],
    "empty corpus": lambda d: ["train", "--corpus", bad_file(d / "empty.txt", b"\n \n")],
    "too few sentences": lambda d: ["train", "--corpus", bad_file(d / "few.txt", b"a\nb\n")],
    "not UTF-8": lambda d: ["train", "--corpus", bad_file(d / "latin.txt", b"caf\xe9\n" * 99)],
    "temperature 0": lambda d: ["train", "--temperature", "0"],
    "temperature below 0": lambda d: ["train", "--temperature", "-1"],
    "NaN m": lambda d: ["train", "--m", "nan"],
    "recipe": lambda d: ["train", "--recipe", "none-such"],
    "objective": lambda d: ["train", "--objective", "none_such"],
    "pooling": lambda d: ["evaluate", "minilm", "--pooling", "max"],
    "task": lambda d: ["evaluate", "minilm", "--tasks", "STS99"],
    "modulate": lambda d: ["train", "--modulate", "all"],
    "steps": lambda d: ["train", "--steps", "abc"],
    "steps below 1": lambda d: ["train", "--steps", "0"],
    "flag": lambda d: ["train", "--no-such-flag", "1"],
    "command": lambda d: ["fly"],
    "no command": lambda d: [],
    "no model": lambda d: ["evaluate"],
    "no such model": lambda d: ["evaluate", str(d / "none"), "--tasks", "Lee"],
    "model folder without weights": lambda d: [
        "evaluate",
        bad_file(d / "config.json", b'{"model_type": "bert"}') and str(d),
        "--tasks",
        "Lee",
    ],
    "output that is a file": lambda d: ["train", "--output", bad_file(d / "file", b"mine")],
    "output with foreign files": lambda d: [
        "train",
        "--output",
        bad_file(d / "notes.txt", b"mine") and str(d),
    ],
    "figures that are a file": lambda d: ["study", "--figures", bad_file(d / "file", b"mine")],
    "a path too long": lambda d: ["train", "--corpus", "x" * 300],
    "json that is a folder": lambda d: ["evaluate", "minilm", "--tasks", "Lee", "--json", str(d)],
    "json folder": lambda d: ["evaluate", "minilm", "--tasks", "Lee", "--json", str(d / "x/y")],
    "senteval folder": lambda d: ["evaluate", "minilm", "--senteval", str(d / "none")],
    "nothing to compare with": lambda d: ["compare", "minilm"],
    "no such model to compare": lambda d: ["compare", "minilm", str(d / "none")],
    "few resamples": lambda d: ["compare", "minilm", "minilm", "--resamples", "3"],
    "no confidence": lambda d: ["compare", "minilm", "minilm", "--confidence", "95"],
    "task to compare on": lambda d: ["compare", "minilm", "minilm", "--tasks", "STS99"],
    "findings of nothing": lambda d: ["findings", str(d / "none")],
    "layers below 0": lambda d: ["train", "--sscl.layers", "-1"],
    "methods at odds": lambda d: ["train", "--objective", "core_tuning+sscl"],
    "two objectives": lambda d: ["train", "--objective", "info_nce+focal_info_nce"],
    "a method's unknown setting": lambda d: ["train", "--sscl.layer", "1"],
    "no folder of runs": lambda d: ["report", str(d / "none")],
    "a folder without runs": lambda d: ["report", str(d)],
    "a run without record": lambda d: ["report", bad_file(d / "run.json", b"{") and str(d)],
    "no checkpoint": lambda d: ["import", str(d / "none"), str(d / "model")],
    "a checkpoint without encoder": lambda d: [
        "import",
        bad_file(d / "pytorch_model.bin", b"x"),
        str(d / "model"),
    ],
    "output of an import that is there": lambda d: [
        "import",
        str(d / "none"),
        bad_file(d / "file", b"mine"),
    ],
    "a missing year": lambda d: [
        *("evaluate", "minilm", "--tasks", "STS13", "--senteval"),
        (d / "downstream/STS/STS12-en-test").mkdir(parents=True) or str(d),
    ],
    "gold and input of different length": lambda d: [
        *("evaluate", "minilm", "--tasks", "STS12", "--senteval"),
        short_gold(d / "downstream/STS/STS12-en-test") or str(d),
    ],
    "no STS data": lambda d: ["evaluate", "minilm", "--tasks", "STS12"],
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.usefixtures("no_sts_data")
def test_bad_input_is_one_line(case, tmp_path, capsys):
    arguments = BAD[case](tmp_path)
    before = tree(tmp_path)
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    last = captured.err.strip().splitlines()
    assert len(last) == 1, captured.err
    assert last[0].startswith("fcse: ")
    assert len(last[0]) > 20
    assert captured.out == ""
    assert tree(tmp_path) == before


def test_files_at_odds_are_named_with_their_counts(tmp_path, capsys):
    short_gold(tmp_path / "downstream/STS/STS12-en-test")
    run("evaluate", "minilm", "--tasks", "STS12", "--senteval", str(tmp_path))
    message = capsys.readouterr().err
    assert "STS.gs.MSRpar.txt has 2 lines" in message
    assert "STS.input.MSRpar.txt has 3" in message


FOCAL = FocalInfoNCE()


@pytest.mark.parametrize(
    ("said", "objective", "methods"),
    [
        ("", FOCAL, ()),
        ("--objective focal_info_nce --temperature 0.1 --m -0.25", FocalInfoNCE(0.1, -0.25), ()),
        ("--modulate negative", FocalInfoNCE(modulate="negative"), ()),
        ("--stop-gradient", FocalInfoNCE(stop_gradient=True), ()),
        ("--stop-gradient --no-stop-gradient", FOCAL, ()),
        ("--alpha 3", FOCAL, ()),
        ("--objective info_nce --m 0.1 --temperature=0.2", InfoNCE(0.2), ()),
        ("--objective hardness_info_nce", HardnessInfoNCE(), ()),
        ("--objective hardness_info_nce --alpha 2", HardnessInfoNCE(alpha=2.0), ()),
        ("--objective hardness_info_nce --alpha 0", InfoNCE(), ()),
        ("--objective sscl", InfoNCE(), (SSCL(),)),
        ("--objective focal_info_nce+sscl", FOCAL, (SSCL(),)),
        ("--objective sscl --sscl.layers 2 --temperature 0.1", InfoNCE(0.1), (SSCL(2),)),
        ("--sscl.layers 1", FOCAL, (SSCL(1),)),
        ("--objective cards+sscl --sscl.layers=0", InfoNCE(), (CARDS(),)),
        ("--core-tuning.no-mixing", FOCAL, (CoreTuning(mixing=False),)),
        ("--core_tuning.no_focal_weight", FOCAL, (CoreTuning(focal_weight=False),)),
        ("--ifnd.cluster-steps 5 --ifnd.clusters 9", FOCAL, (IFND(1.0, 9, 5),)),
    ],
)
@pytest.mark.parametrize("start", ["minilm-short", "roberta-large-focal"])
def test_flags_build_the_objective_and_the_methods(said, objective, methods, start, monkeypatch):
    trained = []
    monkeypatch.setattr(cli.commands, "run_train", trained.append)
    assert run("train", "--recipe", start, *said.split()) == 0
    assert trained == [replace(recipe(start), objective=objective, methods=methods)]


def test_flags_for_all_settings_give_the_config_back(monkeypatch, tmp_path):
    trained = []
    monkeypatch.setattr(cli.commands, "run_train", trained.append)
    focal = FocalInfoNCE(0.1, -0.25, "negative", stop_gradient=True)
    methods = (CoreTuning(mixing=False), IFND(0.3, 7), SSCL(2))
    config = replace(recipe("minilm-short"), objective=focal, methods=methods, seed=2**32 - 1)
    config = replace(config, micro_batch_size=3, output=str(tmp_path), metric="lee")
    assert run(*flags(config)) == 0
    assert trained == [config]


def test_train_writes_a_run_reuses_it_and_refuses_another(tiny_model, corpus, tmp_path, capsys):
    arguments = [
        "train",
        *("--encoder", str(tiny_model("bert")), "--corpus", corpus, "--steps", "2"),
        *("--batch-size", "8", "--max-length", "16", "--output", str(tmp_path / "run")),
    ]
    assert run(*arguments) == 0
    assert "lee " in capsys.readouterr().out
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["config"]["batch_size"] == 8
    before = tree(tmp_path)
    assert run(*arguments) == 0
    assert tree(tmp_path) == before
    capsys.readouterr()
    assert run(*arguments, "--seed", "1") == 2
    assert "another run" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_evaluate_writes_scores(tmp_path, capsys):
    path = tmp_path / "scores.json"
    assert run("evaluate", "minilm", "--tasks", "Lee", "--json", str(path)) == 0
    scores = json.loads(path.read_text())
    assert scores["Lee"] == pytest.approx(47.44, abs=0.05)
    assert scores["pooling"] == "cls"
    assert "47.44" in capsys.readouterr().out


def test_evaluate_in_bf16(tmp_path, capsys):
    path = tmp_path / "scores.json"
    flags = ["--tasks", "Lee", "--precision", "bf16", "--json", str(path)]
    assert run("evaluate", "minilm", *flags) == 0
    assert "precision bf16" in capsys.readouterr().out
    scores = json.loads(path.read_text())
    assert scores["precision"] == "bf16"
    # As in float32 to three digits would mean that nothing was computed in bf16.
    assert 1e-3 < abs(scores["Lee"] - 47.4409) < 0.2


def test_evaluate_reads_the_pooling_that_a_folder_declares(tiny_model, tmp_path, capsys):
    folder = tmp_path / "model"
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"), "mean")
    encoder.save_pretrained(folder)
    path = tmp_path / "scores.json"
    assert run("evaluate", str(folder), "--tasks", "Lee", "--json", str(path)) == 0
    assert "pooling mean" in capsys.readouterr().out
    scores = json.loads(path.read_text())
    assert scores["pooling"] == "mean"
    assert scores["Lee"] == pytest.approx(lee_score(encoder))
    assert run("evaluate", str(folder), "--pooling", "cls", "--tasks", "Lee") == 0
    assert "pooling cls" in capsys.readouterr().out


def test_compare_prints_intervals(tiny_model, tmp_path, capsys):
    path = tmp_path / "comparison.json"
    other = str(tiny_model("bert"))
    assert run("compare", "minilm", other, "--resamples", "200", "--json", str(path)) == 0
    shown = capsys.readouterr().out
    result = json.loads(path.read_text())["Lee"]
    assert result["low"] < result["difference"] < result["high"] < 0
    assert f"{result['difference']:+.2f} (95 % interval {result['low']:+.2f} to" in shown
    assert "n = 1225" in shown


def test_report_prints_intervals_and_draws(tiny_model, corpus, tmp_path, capsys):
    for objective in ("info_nce", "focal_info_nce"):
        for seed in ("0", "1"):
            arguments = [
                *("train", "--encoder", str(tiny_model("bert")), "--corpus", corpus),
                *("--steps", "2", "--batch-size", "8", "--max-length", "16"),
                *("--objective", objective, "--seed", seed),
            ]
            assert run(*arguments) == 0
    capsys.readouterr()
    assert run("report", "--figures", str(tmp_path / "figures")) == 0
    shown = capsys.readouterr().out
    gain = over_seeds(score_runs(load_runs(tmp_path / "runs"), [load_lee()]))["gain"].iloc[-1]
    assert f"over InfoNCE, paired: {gain}" in shown
    assert "+14.0 sd" in shown
    code, loaded = heavy("report")["report"]
    assert code == 0
    assert loaded <= TABLES, "what is scored already is read, without torch"
    drawn = {p.name for p in (tmp_path / "figures").iterdir()}
    assert drawn == {
        f"{name}.{suffix}"
        for name in ("beside_published", "over_seeds_1")
        for suffix in ("png", "svg", "csv")
    }


def test_report_without_runs_shows_what_is_published(capsys):
    assert run("report") == 0
    assert capsys.readouterr().out.count("published") == 8


def test_import_makes_a_model_folder(tiny_model, tmp_path, capsys):
    source = AutoModel.from_pretrained(tiny_model("bert"))
    state = {f"bert.{name}": x for name, x in source.state_dict().items()}
    head = torch.nn.Linear(32, 32)
    state |= {f"mlp.dense.{name}": x.detach() for name, x in head.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    out = tmp_path / "imported"
    arguments = ["import", str(tmp_path / "pytorch_model.bin"), str(out)]
    assert run(*arguments, "--encoder", str(tiny_model("roberta"))) == 2
    assert "does not fit" in capsys.readouterr().err
    assert not out.exists()
    assert run(*arguments, "--encoder", str(tiny_model("bert"))) == 0
    encoder = SentenceEncoder.from_pretrained(out)
    assert torch.equal(encoder.head[0].weight, head.weight)
    assert run("evaluate", str(out), "--tasks", "Lee") == 0


def test_evaluate_sts_agrees_with_senteval(tmp_path, senteval):
    # Scores of the SentEval code on the same weights and files.
    path = tmp_path / "scores.json"
    tasks = ["--tasks", "STS16", "STSBenchmark"]
    assert run("evaluate", "minilm", "--senteval", senteval, *tasks, "--json", str(path)) == 0
    scores = json.loads(path.read_text())
    assert scores["STS16"] == pytest.approx(73.5467, abs=0.01)
    assert scores["STSBenchmark"] == pytest.approx(73.5042, abs=0.01)
    assert scores["STSBenchmark-dev"] == pytest.approx(79.7315, abs=0.01)
    assert scores["avg"] == pytest.approx((scores["STS16"] + scores["STSBenchmark"]) / 2)
    assert sum(part["pairs"] for part in scores["subsets"]["STS16"].values()) == 1186


def test_doctor_finds_every_packaged_asset(capsys):
    assert run("doctor") == 0
    shown = capsys.readouterr().out
    assert shown.count(": ok, SHA-256") == 4
    for what in ("device", "threads", "precision", "memory", "runs", "cache", "hub"):
        assert f"\n{what:12}" in shown
    assert re.search(r"^precision +auto means (bf16|float32) here \(units for bf16: ", shown, re.M)


def test_doctor_says_what_is_wrong_and_how_to_mend_it(tmp_path):
    (tmp_path / "file").write_text("")
    wrong = {
        "FCSE_RUNS": str(tmp_path / "file"),
        "FCSE_SENTEVAL": str(tmp_path / "none"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "fcse.cli", "doctor"],
        capture_output=True,
        text=True,
        env=os.environ | wrong,
    )
    assert done.returncode == 2
    out, err = done.stdout, done.stderr
    assert re.search(r"^! runs +.*cannot be written .* name another with FCSE_RUNS$", out, re.M)
    assert re.search(r"^! STS data ", out, re.M)
    assert err == "fcse: to be mended, see above: runs, STS data\n"


def test_the_parsers_frame_stays_out_where_output_is_ascii(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fcse.cli", "train", "--steps", "abc"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fcse: Error parsing --steps")
    assert "----" not in done.stderr


def test_exit_code_of_the_process(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fcse.cli", "train", "--temperature", "0"],
        capture_output=True,
        text=True,
        env=os.environ,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "fcse: temperature must be a finite number above 0, got 0.0"
    ]
