"""A server and two clients as processes over loopback, by Flower, give the plain loop's weights.

Skipped where `make federated` has made no environment for Flower: its pins do not go with ours."""

import json
import os
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fcse.data import load_wiki_articles
from fcse.encoder import SentenceEncoder
from fcse.methods.fed_rcl import FedRCL
from fcse.training import train

ROOT = Path(__file__).parents[1]
BIN = Path(os.environ.get("FCSE_FEDERATED", ROOT / ".venv-federated")) / "bin"

pytestmark = pytest.mark.skipif(
    not (BIN / "flwr").exists(), reason="no environment for Flower: make federated"
)


@contextmanager
def started(environment, log, *command):
    """A process that runs within this context and writes to a file."""
    with log.open("w") as out:
        command = [BIN / command[0], *map(str, command[1:])]
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def free_ports(count):
    held = [socket.socket() for _ in range(count)]
    for each in held:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports


def answers(port):
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def test_a_real_federation_gives_the_plain_loops_weights(tiny_config, tmp_path):
    corpus = tmp_path / "articles.txt"
    articles = [*load_wiki_articles().values()][:5]
    corpus.write_text("\n".join(x for every in articles for x in every[:24]), encoding="utf-8")
    at = tiny_config(tmp_path / "run", objective="info_nce", corpus=str(corpus))
    settings = FedRCL(clients=2, rounds=2)
    config = replace(at, methods=(settings,))
    plain = train(config)

    encoder = SentenceEncoder.from_pretrained(config.encoder, config.pooling, config.seed)
    for client, share in enumerate(settings.shares(config, encoder)):
        (tmp_path / str(client)).mkdir()
        (tmp_path / f"{client}/{client}.txt").write_text("\n".join(share), encoding="utf-8")
    link, *nodes = free_ports(3)
    said = {"settings": json.dumps(config.settings), "output": str(tmp_path / "federated")}
    run_config = tmp_path / "run.toml"
    run_config.write_text("".join(f"{k} = {json.dumps(x)}\n" for k, x in said.items()))
    (tmp_path / "flower").mkdir()
    where = f'[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    (tmp_path / "flower/config.toml").write_text(where)
    environment = os.environ | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "FLWR_HOME": str(tmp_path / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }

    def logged(name):
        return tmp_path / f"{name}.log"

    alone = "--disable-runtime-dependency-installation"
    serve = ["flower-superlink", "--insecure", "--port", link, alone]
    node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}"]
    own = [f'client={i} place="{tmp_path / str(i)}"' for i in range(2)]
    with (
        started(environment, logged("server"), *serve) as superlink,
        started(environment, logged(0), *node, "--port", nodes[0], "--node-config", own[0]),
        started(environment, logged(1), *node, "--port", nodes[1], "--node-config", own[1]),
    ):
        while superlink.poll() is None and not answers(link):
            time.sleep(0.1)
        command = [BIN / "flwr", "run", ROOT / "tests/federated", "here", "--stream"]
        done = subprocess.run(
            [*command, "--run-config", run_config],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
    logs = "\n".join(logged(name).read_text() for name in ("server", 0, 1))
    assert (tmp_path / "federated").is_dir(), done.stdout + done.stderr + logs
    federated = SentenceEncoder.from_pretrained(tmp_path / "federated").state_dict()
    for name, x in plain.encoder.state_dict().items():
        assert torch.equal(federated[name], x), name
