"""FedRCL as a real federation: a server and clients that are processes, on as many machines.

For Flower 1.42, in the environment that `make federated` makes. The run's config names `settings`,
the flat settings of a config with fed_rcl as JSON, and `output`, the model folder that the server
writes. A node's config names `client`, its number from 0, and `place`, a folder of its own with
its sentences in the file CLIENT.txt; its runs are written there too. No sentence leaves it.

test_federation.py starts all of it on one machine."""

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fcse.config import TrainConfig, configured
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError, replacing
from fcse.training import train

# One a line: Flower looks for them in the source.
server = ServerApp()
client = ClientApp()


def begun(context):
    """The config, its FedRCL, and the encoder that all start from."""
    config = configured(TrainConfig(), json.loads(context.run_config["settings"]))
    (fed_rcl,) = (method for method in config.methods if method.key == "fed_rcl")
    return (
        config,
        fed_rcl,
        SentenceEncoder.from_pretrained(config.encoder, config.pooling, config.seed),
    )


@server.main()
def serve(grid: Grid, context: Context) -> None:
    _, fed_rcl, encoder = begun(context)
    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=fed_rcl.clients,
        min_available_nodes=fed_rcl.clients,
        weighted_by_key="weight",
    )
    start = ArrayRecord(encoder.state_dict())
    result = strategy.start(grid, start, num_rounds=fed_rcl.rounds)
    if len(result.train_metrics_clientapp) < fed_rcl.rounds:
        raise RuntimeError("a round ended without any client: see what the clients say")
    encoder.load_state_dict(result.arrays.to_torch_state_dict())
    with replacing(Path(context.run_config["output"])) as new:
        encoder.save_pretrained(new)


@client.train()
def train_client(message: Message, context: Context) -> Message:
    config, fed_rcl, encoder = begun(context)
    place, number = Path(context.node_config["place"]), message.content["config"]["server-round"]
    sent = message.content["arrays"].to_torch_state_dict()
    if number > 1:
        encoder.load_state_dict(sent)
        with replacing(place / "server") as new:
            encoder.save_pretrained(new)
    elif not all(torch.equal(x, sent[name]) for name, x in encoder.state_dict().items()):
        raise InputError(f"the server starts from another encoder than {config.encoder}")
    run = train(fed_rcl.of_client(config, number, context.node_config["client"], place))
    found = {
        "arrays": ArrayRecord(run.encoder.state_dict()),
        "metrics": MetricRecord({"weight": 1, "loss": sum(run.losses) / len(run.losses)}),
    }
    return Message(content=RecordDict(found), reply_to=message)
