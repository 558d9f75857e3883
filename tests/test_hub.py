"""What comes from the hub, through its own clients: fetched once, checked, resumed, kept."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
from conftest import CONFIGS, make_tokenizer, save_tiny_model
from hub_server import HubServer

from fcse.data import HUB_DATASET, load_corpus, load_lee, load_sts, senteval_folder, text_hash
from fcse.encoder import SentenceEncoder
from fcse.encoder.precision import resolve_precision
from fcse.encoder.sentence_encoder import weights_hash
from fcse.evaluation import judge
from fcse.recipes import RECIPES

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the commands here are forks")

DATASET = f"datasets/{HUB_DATASET}"
CORPUS, ARCHIVE = "wiki1m_for_simcse.txt", "senteval.tar"
DOWNSTREAM = "SentEval/data/downstream"
SENTENCES = 3000
PAPER = [name for name, config in RECIPES.items() if config.corpus == "wiki1m"]
SHORT = ["--steps", "2", "--batch-size", "16", "--eval-steps", "1"]
TRAIN = ["train", "--recipe", "bert-base-focal", *SHORT]
EVALUATE = ["evaluate", "bert-base-uncased", "--tasks", "STSBenchmark"]

# Importing everything takes most of a short command's time: done once here, for all of them. What
# is frozen is not collected once more as each of them ends.
WORKER = """
import gc, json, os, sys
from fcse import cli
from transformers import BertModel, RobertaModel
gc.freeze()
for line in sys.stdin:
    arguments, *outputs = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, path in enumerate(outputs, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        cli.main(arguments)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


class Machine:
    """A user's machine that has `hub` for its model hub, and a home folder that starts empty."""

    def __init__(self, home, hub):
        self.home = home
        self.runs = home / "runs"
        inherited = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "FCSE_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(inherited)} | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home / "huggingface"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "XDG_CACHE_HOME": str(home / "cache"),
            "FCSE_RUNS": str(self.runs),
            "NO_PROXY": "127.0.0.1",
        }
        self.worker = self.python(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def python(self, code, **streams):
        return subprocess.Popen(
            [sys.executable, "-c", code],
            **streams,
            env=self.environment,
            cwd=self.home.parent,
            text=True,
        )

    def fcse(self, *arguments):
        """Run a command to its end, in a process of its own."""
        outputs = [self.home.parent / name for name in ("out.txt", "err.txt")]
        request = [list(map(str, arguments)), *map(str, outputs)]
        self.worker.stdin.write(json.dumps(request) + "\n")
        self.worker.stdin.flush()
        code = int(self.worker.stdout.readline())
        return Done(code, *(path.read_text(encoding="utf-8") for path in outputs))

    def cached(self, name):
        """The bytes of a file of the dataset that the hub's cache holds."""
        (path,) = self.home.glob(f"huggingface/hub/datasets--*/snapshots/*/{name}")
        return path.read_bytes()

    def close(self):
        self.worker.stdin.close()
        self.worker.stdout.close()
        self.worker.wait()


@pytest.fixture(scope="module")
def backbones(tmp_path_factory, sentences):
    """Hub name -> folder of a tiny model of that architecture, other weights under each name."""
    folders = {}
    for architecture in ("bert", "roberta"):
        tokenizer = make_tokenizer(sentences, byte_pairs=architecture == "roberta")
        config = CONFIGS[architecture](len(tokenizer))
        suffix = "-uncased" if architecture == "bert" else ""
        for seed, size in enumerate(("base", "large")):
            folder = tmp_path_factory.mktemp("backbones") / f"{architecture}-{size}"
            folders[f"{architecture}-{size}{suffix}"] = save_tiny_model(
                config, tokenizer, folder, seed
            )
    return folders


def pack(members):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, Path):
                member.type, member.linkname = tarfile.SYMTYPE, str(content)
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture(scope="module")
def rows():
    """The STS benchmark's files by path: heads of those in the folder that is named, else made of
    Lee's pairs."""
    names = [f"STS/STSBenchmark/sts-{split}.csv" for split in ("train", "dev", "test")]
    folder = senteval_folder()
    if folder is not None:
        heads = {name: (folder / name).read_bytes().split(b"\n")[:200] for name in names}
        return {f"{DOWNSTREAM}/{name}": b"\n".join(head) for name, head in heads.items()}
    lee = load_lee()
    pairs = zip(lee.gold * 5, lee.left, lee.right, strict=True)
    lines = "".join(f"news\tlee\t2005\t{i}\t{g}\t{a}\t{b}\n" for i, (g, a, b) in enumerate(pairs))
    return {f"{DOWNSTREAM}/{name}": lines.encode() for name in names}


@pytest.fixture(scope="module")
def content(rows):
    """The dataset's files by name, of real text."""
    return {CORPUS: "\n".join(load_corpus("wiki-mini", SENTENCES)).encode(), ARCHIVE: pack(rows)}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    hub = HubServer()
    hub.start()
    machine = Machine(tmp_path_factory.mktemp("machine") / "home", hub)
    yield hub, machine
    machine.close()
    hub.stop()


@pytest.fixture
def hub(running, content, backbones):
    """The server with the paper's corpus, STS data and backbones, without a fault."""
    server, _ = running
    server.stop()
    server.reset()
    server.start()
    server.publish(DATASET, content)
    for name, folder in backbones.items():
        server.publish(name, folder)
    return server


@pytest.fixture
def machine(running):
    _, machine = running
    shutil.rmtree(machine.home, ignore_errors=True)
    machine.home.mkdir()
    return machine


def refused(done):
    """The one line that a refused command leaves."""
    assert (done.code, done.out) == (2, ""), done.err
    (line,) = done.err.splitlines()
    assert line.startswith("fcse: ")
    return line


@pytest.mark.parametrize("name", PAPER)
def test_paper_recipe_takes_everything_from_the_hub(name, hub, machine, backbones):
    done = machine.fcse("train", "--recipe", name, *SHORT)
    assert done.code == 0, done.err
    (folder,) = machine.runs.iterdir()
    record = json.loads((folder / "run.json").read_text())
    expected = asdict(RECIPES[name]) | {"steps": 2, "batch_size": 16, "eval_steps": 1}
    assert not expected.pop("methods") and expected.pop("output") is None
    expected["precision"] = resolve_precision("auto")
    assert record["config"] == expected | expected["objective"] | {"objective": "focal_info_nce"}
    assert record["finished"]
    assert record["corpus"]["sha256"] == text_hash(load_corpus("wiki-mini", SENTENCES))
    served = SentenceEncoder.from_pretrained(backbones[RECIPES[name].encoder])
    assert record["weights"]["first"] == weights_hash(served.backbone)
    assert record["weights"]["last"] != record["weights"]["first"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scored = {line["step"]: line["stsb_dev"] for line in lines if "stsb_dev" in line}
    assert scored.keys() == {0, 1, 2}
    # Kept are the weights of the best score on the dev split.
    assert record["scores"]["stsb_dev"] == scored[record["kept_step"]] == max(scored[1], scored[2])
    (unpacked,) = machine.home.glob(f"cache/fcse/senteval-*/{DOWNSTREAM}")
    judged = load_sts("STSBenchmark", "dev", unpacked)
    score = judge(SentenceEncoder.from_pretrained(folder), judged)["spearman"]
    assert score == pytest.approx(record["scores"]["stsb_dev"], abs=1e-3)
    for file in (CORPUS, ARCHIVE, "model.safetensors", "tokenizer.json"):
        assert len(hub.downloads(file)) == 1


def test_second_use_fetches_nothing_and_works_without_the_hub(hub, machine):
    first = machine.fcse(*TRAIN)
    assert first.code == 0, first.err
    fetched = hub.downloads()
    again = machine.fcse(*TRAIN, "--seed", "1")
    assert again.code == 0, again.err
    assert hub.downloads() == fetched
    hub.stop()
    offline = machine.fcse(*TRAIN, "--seed", "2")
    assert offline.code == 0, offline.err
    assert len(list(machine.runs.iterdir())) == 3


def test_download_cut_off_is_resumed(hub, machine, content, rows):
    # The client keeps what came in pieces of 10 MB.
    text = content[CORPUS] * (24_000_000 // len(content[CORPUS]) + 1)
    whole = pack(rows | {"SentEval/data/wiki.txt": text})
    hub.publish(DATASET, {ARCHIVE: whole})
    hub.cut.add(f"{DATASET}/{ARCHIVE}")
    done = machine.fcse(*EVALUATE)
    assert done.code == 0, done.err
    first, second = hub.downloads(ARCHIVE)
    assert first.range is None
    assert 0 < int(second.range.removeprefix("bytes=").removesuffix("-")) <= len(whole) // 2
    assert machine.cached(ARCHIVE) == whole


def test_process_killed_while_it_downloads_leaves_nothing_that_is_taken_for_whole(
    hub, machine, content
):
    code = f"from fcse.data import download; download({CORPUS!r})"
    hub.held.add(f"{DATASET}/{CORPUS}")
    killed = machine.python(code)
    assert hub.stalled.wait(60)
    killed.kill()
    killed.wait()
    assert not list(machine.home.glob(f"huggingface/hub/datasets--*/snapshots/*/{CORPUS}"))
    assert machine.python(code).wait() == 0
    assert machine.cached(CORPUS) == content[CORPUS]


@pytest.mark.parametrize(
    ("file", "command", "chunked"),
    [(CORPUS, TRAIN, False), (ARCHIVE, EVALUATE, False), (ARCHIVE, EVALUATE, True)],
    ids=["corpus", "STS data", "STS data from the chunk store"],
)
def test_damaged_download_is_removed_and_fetched_again(
    file, command, chunked, hub, machine, content
):
    key = f"{DATASET}/{file}"
    if chunked:
        pytest.importorskip("hf_xet")
        hub.chunked.add(key)
    hub.damaged.add(key)
    line = refused(machine.fcse(*command))
    assert f"{file} of {HUB_DATASET} was damaged" in line
    assert "is removed: run the command again" in line
    assert not [p for p in machine.home.rglob("*") if p.is_file() and p.name == file]
    assert not machine.runs.exists()
    again = machine.fcse(*command)
    assert again.code == 0, again.err
    assert machine.cached(file) == content[file]


def test_file_from_the_chunk_store_is_taken_and_kept(hub, machine, content):
    # There the client names the bytes by another hash than SHA-256.
    pytest.importorskip("hf_xet")
    hub.chunked.update((f"{DATASET}/{CORPUS}", f"{DATASET}/{ARCHIVE}"))
    hub.chunked.add("bert-base-uncased/model.safetensors")
    for command in (TRAIN, [*TRAIN, "--seed", "1"]):
        done = machine.fcse(*command)
        assert done.code == 0, done.err
        assert len(hub.blocks()) == 3
    assert not [r for r in hub.downloads() if r.path.endswith((CORPUS, ARCHIVE, ".safetensors"))]
    assert [machine.cached(name) for name in content] == list(content.values())


@pytest.mark.parametrize(
    ("command", "named", "way_out"),
    [
        (TRAIN, CORPUS, "go online once, or give a local path"),
        (EVALUATE, ARCHIVE, "name a SentEval folder with --senteval or FCSE_SENTEVAL"),
        (["evaluate", "roberta-base", "--tasks", "Lee"], "'roberta-base'", "give minilm, a model"),
    ],
    ids=["corpus", "STS data", "backbone"],
)
def test_nothing_cached_and_no_hub_is_one_line(command, named, way_out, hub, machine):
    hub.stop()
    started = time.perf_counter()
    line = refused(machine.fcse(*command))
    assert time.perf_counter() - started < 10
    assert named in line
    assert way_out in line
    assert not machine.runs.exists()


def test_name_that_the_hub_does_not_know_is_one_line(hub, machine):
    line = refused(machine.fcse("evaluate", "nobody/no-such-model", "--tasks", "Lee"))
    assert "'nobody/no-such-model' could not be loaded" in line


def evil_path(rows):
    return pack(rows | {"../../evil": b"evil"})


def evil_link(rows):
    return pack(rows | {"out": Path("../../.."), "out/evil": b"evil"})


def truncated(rows):
    whole = pack(rows)
    return whole[: len(whole) // 2]


def web_page(rows):
    return b"<html>Please sign in to this network</html>"


@pytest.mark.parametrize("spoil", [evil_path, evil_link, truncated, web_page])
def test_archive_that_cannot_be_trusted_is_one_line(spoil, hub, machine, rows):
    hub.publish(DATASET, {ARCHIVE: spoil(rows)})
    line = refused(machine.fcse(*EVALUATE))
    assert f"{ARCHIVE} cannot be unpacked" in line
    assert not list(machine.home.parent.rglob("evil"))
    assert not list((machine.home / "cache" / "fcse").iterdir())


def plain(folder, save):
    return folder


def declaring(pooling):
    def make(folder, save):
        SentenceEncoder.from_pretrained(folder, pooling).save_pretrained(save)
        return save

    return make


def in_a_subfolder(folder, save):
    """The older layout of sentence-transformers: the backbone in a folder of its own."""
    declaring("mean")(folder, save)
    modules = json.loads((save / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (save / "0_Transformer").mkdir()
    for path in [p for p in save.iterdir() if p.is_file()]:
        path.rename(save / "0_Transformer" / path.name)
    (save / "modules.json").write_text(json.dumps(modules))
    return save


@pytest.mark.parametrize(
    ("make", "pooling"),
    [
        (plain, "cls"),
        (declaring("mean"), "mean"),
        (declaring("mean_first_last"), "mean_first_last"),
        (in_a_subfolder, "mean"),
    ],
    ids=["plain", "mean", "mean_first_last", "in a subfolder"],
)
def test_model_on_the_hub_scores_as_its_folder(make, pooling, hub, machine, backbones, tmp_path):
    folder = make(backbones["bert-base-uncased"], tmp_path / "model")
    hub.publish("someone/model", folder)
    report = tmp_path / "scores.json"
    done = machine.fcse("evaluate", "someone/model", "--tasks", "Lee", "--json", report)
    assert done.code == 0, done.err
    assert done.out.startswith(f"someone/model, pooling {pooling}, ")
    local = {
        name: judge(SentenceEncoder.from_pretrained(folder, name), load_lee())["spearman"]
        for name in ("cls", "mean", "mean_first_last")
    }
    score = json.loads(report.read_text())["Lee"]
    assert score == pytest.approx(local.pop(pooling), abs=1e-4)
    assert all(score != pytest.approx(other, abs=1e-4) for other in local.values())
    assert len(hub.downloads("model.safetensors")) == 1 + (pooling == "mean_first_last")
