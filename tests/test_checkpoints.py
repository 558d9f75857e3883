"""Checkpoints as the original trainers write them: what is read, and what is refused."""

import json
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import bert_config, make_tokenizer, one_line_refusal, save_tiny_model
from safetensors.torch import load_file, save_file

from fcse.encoder import SentenceEncoder
from fcse.encoder.checkpoints import import_checkpoint

WIDTH = 32
CLASSES = {"bert": "BertForCL", "roberta": "RobertaForCL"}
HEADS = {"simcse": "dense", "focal": "key_layer"}
"""What the layer under `mlp.` is called in the two repositories."""


@pytest.fixture(scope="module")
def texts(sentences):
    return [sentences[0], "Yes.", *sentences[3:6], " ".join(sentences[:20])]


@pytest.fixture(scope="module")
def trained(tiny_model):
    """Architecture -> an encoder with a head as training leaves it: neither part is fresh."""

    def encoder(architecture):
        encoder = SentenceEncoder.from_pretrained(tiny_model(architecture), "cls", seed=7)
        torch.nn.init.normal_(encoder.head[0].bias, generator=torch.Generator().manual_seed(7))
        with torch.no_grad():
            for parameter in encoder.backbone.parameters():
                parameter.mul_(1.05)
        return encoder

    return encoder


def state_dict(encoder, head="dense", extras=False, wrapped=False):
    """What the trainers' `model.state_dict()` gives for these weights."""
    architecture = encoder.backbone.config.model_type
    state = {f"{architecture}.{k}": x for k, x in encoder.backbone.state_dict().items()}
    if head:
        state |= {f"mlp.{head}.{k}": x for k, x in encoder.head[0].state_dict().items()}
    if extras:
        words = state[f"{architecture}.embeddings.word_embeddings.weight"]
        positions = len(state[f"{architecture}.embeddings.position_embeddings.weight"])
        state |= {
            f"{architecture}.embeddings.position_ids": torch.arange(positions)[None],
            f"{architecture}.pooler.dense.weight": torch.ones(WIDTH, WIDTH),
            f"{architecture}.pooler.dense.bias": torch.ones(WIDTH),
            "lm_head.bias": torch.ones(len(words)),
            "lm_head.dense.weight": torch.ones(WIDTH, WIDTH),
            "lm_head.decoder.weight": words,
        }
    prefix = "module." if wrapped else ""
    return {prefix + k: x.detach().clone() for k, x in state.items()}


def save_state(state, path):
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(state, path)


def save_folder(state, folder, name, base):
    """A trainer's output folder: weights, configuration with its class, tokenizer."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = [CLASSES[config["model_type"]]]
    (folder / "config.json").write_text(json.dumps(config))
    save_state(state, folder / name)
    return folder


@torch.no_grad()
def check(encoder, source, texts):
    """Embeddings are the backbone's, training views are tanh(W cls + b) of the head."""
    expected = source.encode(texts)
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-6)
    layer = source.head[0]
    by_hand = torch.tanh(torch.from_numpy(expected) @ layer.weight.T + layer.bias)
    for view in encoder(encoder.tokenize(texts)):
        torch.testing.assert_close(view, by_hand, rtol=0, atol=1e-5)


def test_the_checks_tell_weights_apart(trained, tiny_model, texts):
    for architecture in CLASSES:
        source, fresh = (
            trained(architecture),
            SentenceEncoder.from_pretrained(tiny_model(architecture)),
        )
        assert np.abs(source.encode(texts) - fresh.encode(texts)).max() > 1e-2
        assert (source.head[0].weight - fresh.head[0].weight).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("repository", HEADS)
@pytest.mark.parametrize("architecture", CLASSES)
def test_a_trainers_folder(architecture, repository, name, trained, tiny_model, texts, tmp_path):
    source = trained(architecture)
    state = state_dict(source, HEADS[repository])
    folder = save_folder(state, tmp_path / "out", name, tiny_model(architecture))
    encoder = import_checkpoint(folder)
    assert encoder.pooling == "cls"
    assert not encoder.training
    check(encoder, source, texts)

    encoder.save_pretrained(tmp_path / "saved")
    check(SentenceEncoder.from_pretrained(tmp_path / "saved"), source, texts)


@pytest.mark.parametrize("name", ["checkpoint.bin", "weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("architecture", CLASSES)
def test_a_bare_file(architecture, name, trained, tiny_model, texts, tmp_path):
    source = trained(architecture)
    save_state(state_dict(source), tmp_path / name)
    check(import_checkpoint(tmp_path / name, tiny_model(architecture)), source, texts)
    check(import_checkpoint(str(tmp_path / name), str(tiny_model(architecture))), source, texts)


def test_a_file_beside_its_configuration(trained, tiny_model, texts, tmp_path):
    source = trained("bert")
    folder = save_folder(
        state_dict(source), tmp_path / "out", "pytorch_model.bin", tiny_model("bert")
    )
    check(import_checkpoint(folder / "pytorch_model.bin"), source, texts)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("architecture", CLASSES)
def test_what_else_the_trainers_save(architecture, wrapped, trained, tiny_model, texts, tmp_path):
    source = trained(architecture)
    state = state_dict(source, extras=True, wrapped=wrapped)
    save_state(state, tmp_path / "pytorch_model.bin")
    encoder = import_checkpoint(tmp_path / "pytorch_model.bin", tiny_model(architecture))
    check(encoder, source, texts)


def test_an_ordered_dictionary_of_half_precision(trained, tiny_model, texts, tmp_path):
    source = trained("bert").half().float()
    state = trained("bert").state_dict()  # an OrderedDict with metadata, as torch makes it
    state.update(state_dict(source))
    for name in list(state):
        if name.startswith(("backbone.", "head.")):
            del state[name]
        else:
            state[name] = state[name].half()
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    encoder = import_checkpoint(tmp_path / "pytorch_model.bin", tiny_model("bert"))
    assert {x.dtype for x in encoder.parameters()} == {torch.float32}
    check(encoder, source, texts)


@pytest.mark.parametrize("pooling", ["mean", "mean_first_last", "mean_top2"])
@pytest.mark.parametrize("head", ["dense", None])
def test_another_pooling_needs_no_head(head, pooling, trained, tiny_model, texts, tmp_path):
    source = trained("bert")
    source.pooling = pooling
    save_state(state_dict(source, head), tmp_path / "pytorch_model.bin")
    encoder = import_checkpoint(tmp_path / "pytorch_model.bin", tiny_model("bert"), pooling)
    assert encoder.pooling == pooling
    np.testing.assert_allclose(encoder.encode(texts), source.encode(texts), atol=1e-6)


@pytest.fixture
def refused(trained, tiny_model, tmp_path):
    """Change of the state dict, what the refusal says -> checks it for a file and a folder."""

    def check(change, match, name="pytorch_model.bin"):
        state = state_dict(trained("bert"))
        change(state)
        folder = save_folder(state, tmp_path / "out", name, tiny_model("bert"))
        shutil.copy(folder / name, tmp_path / name)
        with one_line_refusal(match):
            import_checkpoint(tmp_path / name, tiny_model("bert"))
        with one_line_refusal(match):
            import_checkpoint(folder)

    return check


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_a_missing_tensor_is_named(name, refused):
    refused(
        lambda state: state.pop("bert.encoder.layer.1.output.dense.weight"),
        r"in 1 weights, the first encoder\.layer\.1\.output\.dense\.weight \(it holds nothing",
        name,
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_an_extra_tensor_is_named(name, refused):
    refused(
        lambda state: state.update({"bert.encoder.layer.3.output.dense.bias": torch.ones(WIDTH)}),
        r"encoder\.layer\.3\.output\.dense\.bias .*expected nothing",
        name,
    )


def test_half_a_head_is_named(refused):
    refused(lambda state: state.pop("mlp.dense.bias"), r"the first bias \(it holds nothing")


def test_a_head_of_another_width_is_named(refused):
    refused(
        lambda state: state.update({"mlp.dense.weight": torch.ones(8, WIDTH)}),
        r"the first weight \(it holds \(8, 32\), expected \(32, 32\)\)",
    )


def test_a_head_of_two_layers_is_refused(refused):
    refused(
        lambda state: state.update({"mlp.query_layer.weight": torch.ones(WIDTH, WIDTH)}),
        r"several layers \(.*mlp\.dense\.weight.*mlp\.query_layer\.weight",
    )


def test_no_head_is_refused(refused):
    def behead(state):
        del state["mlp.dense.weight"], state["mlp.dense.bias"]

    refused(behead, "has no MLP head")


def test_another_width_is_refused(trained, sentences, tmp_path):
    tokenizer = make_tokenizer(sentences)
    wider = save_tiny_model(
        bert_config(len(tokenizer), hidden_size=48), tokenizer, tmp_path / "wider"
    )
    save_state(state_dict(trained("bert")), tmp_path / "pytorch_model.bin")
    with one_line_refusal(r"does not fit the encoder .* \(600, 32\), expected \(600, 48\)"):
        import_checkpoint(tmp_path / "pytorch_model.bin", wider)
    folder = save_folder(state_dict(trained("bert")), tmp_path / "out", "pytorch_model.bin", wider)
    with one_line_refusal("could not be loaded"):
        import_checkpoint(folder)


def test_another_architecture_is_refused(trained, tiny_model, tmp_path):
    save_state(state_dict(trained("bert")), tmp_path / "pytorch_model.bin")
    with one_line_refusal("does not fit the encoder"):
        import_checkpoint(tmp_path / "pytorch_model.bin", tiny_model("roberta"))


def test_a_folder_without_weights_is_refused(trained, tiny_model, tmp_path):
    folder = save_folder({}, tmp_path / "out", "pytorch_model.bin", tiny_model("bert"))
    (folder / "pytorch_model.bin").unlink()
    with one_line_refusal("has no weights"):
        import_checkpoint(folder)
    with one_line_refusal("has no weights"):
        import_checkpoint(folder, tiny_model("bert"))


def test_no_configuration_is_refused(trained, tmp_path):
    save_state(state_dict(trained("bert")), tmp_path / "pytorch_model.bin")
    with one_line_refusal(r"no config\.json beside .*name the encoder"):
        import_checkpoint(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("name", ["no/such/folder", "none.bin", "x" * 300, "null\0byte"])
def test_a_missing_path_is_refused(name, tiny_model, tmp_path):
    with one_line_refusal("is not there"):
        import_checkpoint(tmp_path / name, tiny_model("bert"))


class WritesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "this code ran")


@pytest.mark.parametrize("plain", [False, True])
def test_code_in_a_pickle_does_not_run(plain, trained, tiny_model, tmp_path):
    mark = tmp_path / "mark"
    state = state_dict(trained("bert")) | {"bert.extra": WritesAFile(mark)}
    folder = save_folder({}, tmp_path / "out", "pytorch_model.bin", tiny_model("bert"))
    path = folder / "pytorch_model.bin"
    if plain:
        path.write_bytes(pickle.dumps(state, protocol=2))
    else:
        torch.save(state, path)
    with one_line_refusal("is not unpickled"):
        import_checkpoint(path, tiny_model("bert"))
    with one_line_refusal("is not unpickled"):
        import_checkpoint(folder)
    assert not mark.exists()
    # The file is armed: whoever unpickles it without that care runs the code.
    if plain:
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert mark.read_text() == "this code ran"


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"bert.x": torch.ones(2)}, "epoch": 3},
        [torch.ones(2)],
        torch.ones(2),
        {0: torch.ones(2)},
        {},
    ],
    ids=["nested", "list", "tensor", "numbered", "empty"],
)
def test_what_is_no_state_dict_is_refused(content, tiny_model, tmp_path):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with one_line_refusal("is no state dict|has no MLP head"):
        import_checkpoint(tmp_path / "pytorch_model.bin", tiny_model("bert"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"PK\x03\x04", b"\x80\x02}q\0.", b"version https://git-lfs.github.com/spec/v1\n"],
    ids=["empty", "null", "zip", "pickle", "pointer"],
)
def test_bytes_that_are_no_weights_are_refused(content, name, tiny_model, tmp_path):
    folder = save_folder({}, tmp_path / "out", name, tiny_model("bert"))
    (folder / name).write_bytes(content)
    with one_line_refusal(name):
        import_checkpoint(folder / name, tiny_model("bert"))
    with one_line_refusal(name):
        import_checkpoint(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_bytes_are_refused(zipped, trained, tiny_model, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(state_dict(trained("bert")), path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    chance = random.Random(0)
    for length in chance.sample(range(len(whole)), 8):
        path.write_bytes(whole[:length])
        with one_line_refusal(r"pytorch_model\.bin"):
            import_checkpoint(path, tiny_model("bert"))
    for _ in range(40):
        path.write_bytes(chance.randbytes(chance.randrange(1, 300)))
        with one_line_refusal(r"pytorch_model\.bin"):
            import_checkpoint(path, tiny_model("bert"))


def test_damaged_safetensors_are_refused(trained, tiny_model, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(state_dict(trained("bert")), path)
    assert len(load_file(path)) > 10
    path.write_bytes(path.read_bytes()[:-1])
    with one_line_refusal("cannot be read as weights"):
        import_checkpoint(path, tiny_model("bert"))
