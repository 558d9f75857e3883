"""Several processes, or several micro-batches, compute what one process computes in one pass."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import lee_score, one_line_refusal, train_until_interrupted
from one_step import LENGTH, one_step, save_step
from own_process import CLEAN, flags
from safetensors.torch import load_file

from fcse import losses, processes
from fcse.config import configured
from fcse.encoder import SentenceEncoder
from fcse.training import micro_batches, read_run, train

LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1")


def launch(count, *arguments):
    """What a command says that runs as several processes."""
    command = [*LAUNCH, f"--num_processes={count}", "--main_process_port=0", *arguments]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _one_of(count, rank, port, run, arguments):
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in (ranks | where).items()}
    run(*arguments)
    processes.leave()


def together(count, run, *arguments):
    """Several processes call it as one, as if launched; their imports are done already."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    all_of_them = [
        CLEAN.Process(target=_one_of, args=(count, rank, port, run, arguments))
        for rank in range(count)
    ]
    for each in all_of_them:
        each.start()
    for each in all_of_them:
        each.join()
    assert [each.exitcode for each in all_of_them] == [0] * count


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, sentences):
    """Sixteen sentences, one of them twice, the two in different halves."""
    path = tmp_path_factory.mktemp("corpus") / "sixteen.txt"
    path.write_text("\n".join([*sentences[:15], sentences[2]]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(still_model, corpus):
    """The same step as one process in one pass computes it."""
    return one_step(still_model, corpus.read_text(encoding="utf-8").splitlines(), 16)


@pytest.mark.parametrize(("count", "micro"), [(2, 8), (4, 3)])
def test_processes_give_the_loss_and_gradients_of_one(
    count, micro, whole, still_model, corpus, tmp_path
):
    lines = corpus.read_text(encoding="utf-8").splitlines()
    together(count, save_step, still_model, lines, micro, tmp_path / "step.safetensors")
    shared = load_file(tmp_path / "step.safetensors")
    assert shared.keys() == whole.keys()
    for name, expected in whole.items():
        torch.testing.assert_close(shared[name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_negatives_of_other_processes_matter(whole, still_model, corpus):
    lines = corpus.read_text(encoding="utf-8").splitlines()
    halves = [one_step(still_model, part, 16)["loss"] for part in (lines[:8], lines[8:])]
    assert whole["loss"] > sum(halves) / 2 + 0.1


@pytest.fixture
def still_config(tiny_config, still_model, corpus, tmp_path):
    """All sixteen sentences in each batch, and no dropout."""
    changes = {"batch_size": 16, "steps": 4, "eval_steps": 2}
    return tiny_config(tmp_path / "one", encoder=str(still_model), corpus=str(corpus), **changes)


METHODS = {
    "objective": "focal_info_nce+sscl",
    "cards.k": 4,
    "adap_acse.margin": 0.1,
    "adap_acse.teacher": "minilm",
    "ifnd.acceptance": 0.5,
    "ifnd.clusters": 4,
    "ifnd.cluster_steps": 1,
    "core_tuning.focal_weight": True,
    "core_tuning.mixing": False,
    "pnr.norm": "layer",
    "sparse_cse.sparsity": 0.2,
    "iftcl.queue": 1,
    "debcse.k": 4,
    "debcse.teacher": "minilm",
}


@pytest.mark.parametrize("methods", [{}, METHODS])
def test_a_run_of_two_processes_is_that_of_one(methods, still_config, tmp_path):
    config = configured(still_config, methods | {"recipe": "minilm-wiki"})
    one = train(config)
    elsewhere = replace(config, output=str(tmp_path / "two"))
    if methods:
        together(2, train, elsewhere)
    else:
        said = launch(2, "-m", "fcse.cli", *flags(elsewhere))
        assert said.count("run: ") == 1
    two = read_run(tmp_path / "two")
    assert two.config == elsewhere
    assert len(two.config.methods) == (9 if methods else 0)
    assert two.record["processes"] == 2
    assert two.losses == pytest.approx(one.losses, abs=1e-4)
    assert two.record["masked_pairs"] == one.record["masked_pairs"] == 8
    for a, b in zip(one.evaluations, two.evaluations, strict=True):
        assert a == pytest.approx(b, abs=0.02)
    assert {p.name for p in two.folder.iterdir()} == {p.name for p in one.folder.iterdir()}


@pytest.mark.long
def test_an_evaluation_is_shared(minilm, tmp_path):
    said = launch(
        2, "-m", "fcse.cli", "evaluate", "minilm", "--tasks=Lee", f"--json={tmp_path / 'scores'}"
    )
    assert said.count("Lee ") == 1
    score = json.loads((tmp_path / "scores").read_text())["Lee"]
    assert score == pytest.approx(lee_score(minilm), abs=0.01)


@pytest.mark.long
def test_a_batch_that_cannot_be_shared_is_one_line(still_model, corpus, tmp_path):
    flags = [f"--encoder={still_model}", f"--corpus={corpus}", "--batch-size=15"]
    command = ["-m", "fcse.cli", "train", *flags, f"--output={tmp_path / 'run'}"]
    with pytest.raises(
        AssertionError, match="batch_size 15 cannot be shared evenly by 2 processes"
    ):
        launch(2, *command)


def test_other_many_processes_do_not_go_on_with_a_run(tiny_config, tmp_path):
    config = tiny_config(tmp_path / "run", eval_steps=1)

    train_until_interrupted(config, 1)
    path = tmp_path / "run/resume/1/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"processes": 8}))
    with one_line_refusal("begun by 8 processes, not 1"):
        train(config)


def gradients(encoder):
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batch_size", [1, 5, 8, 15, 100])
def test_micro_batches_give_the_gradients_of_one_pass(micro_batch_size, whole, still_model, corpus):
    lines = corpus.read_text(encoding="utf-8").splitlines()
    cached = one_step(still_model, lines, micro_batch_size)
    for name, expected in whole.items():
        torch.testing.assert_close(cached[name], expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "modernbert"])
def test_dropout_masks_are_the_same_in_both_passes(architecture, tiny_model, sentences):
    encoder = SentenceEncoder.from_pretrained(tiny_model(architecture)).train()
    token_ids = encoder.tokenize(sentences[:12], LENGTH)

    def loss_of(u, v):
        return losses.focal_info_nce(losses.similarity_matrix(u, v))

    torch.manual_seed(3)
    parts = [encoder(token_ids[start : start + 5]) for start in range(0, 12, 5)]
    one_graph = loss_of(*(torch.cat(view) for view in zip(*parts, strict=True)))
    one_graph.backward()
    expected, after = gradients(encoder), torch.rand(3)

    encoder.zero_grad()
    torch.manual_seed(3)
    loss = micro_batches.backward(encoder, token_ids, 5, loss_of)
    assert loss == one_graph
    assert not loss.requires_grad
    assert torch.equal(torch.rand(3), after)
    for name, gradient in gradients(encoder).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_run_with_micro_batches_learns_alike(still_config, tmp_path):
    whole = train(still_config)
    cached = train(replace(still_config, micro_batch_size=4, output=str(tmp_path / "cached")))
    assert cached.losses == pytest.approx(whole.losses, abs=1e-4)
    assert cached.record["masked_pairs"] == whole.record["masked_pairs"] == 8


def test_one_process_is_left_alone(sentences, minilm):
    x = torch.rand(4, 3)
    assert processes.gather_rows(x) is x
    assert processes.share(sentences) == sentences
    assert torch.equal(processes.own_first(x), x)
