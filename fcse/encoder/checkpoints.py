"""Checkpoints that the original SimCSE and Focal-InfoNCE trainers wrote, as encoders of ours."""

import pickle
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fcse.data import is_file, is_folder
from fcse.encoder.pooling import Pooling
from fcse.encoder.sentence_encoder import SentenceEncoder
from fcse.errors import InputError, first_line

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# SimCSE names the layer `mlp.dense`, Focal-InfoNCE `mlp.key_layer`.
_HEAD = re.compile(r"mlp\.\w+\.(weight|bias)")
# Masked-LM heads, the pooler that is not read, and an index buffer of old versions.
_IGNORED = re.compile(r"(lm_head|cls|pooler)\.|embeddings\.position_ids$")


def import_checkpoint(
    checkpoint: str | Path, encoder: str | Path | None = None, pooling: Pooling = "cls"
) -> SentenceEncoder:
    """An encoder with the backbone and the MLP head of a checkpoint of the original trainers.

    Their state dict holds the backbone under `bert.` or `roberta.` and the head, Linear -> tanh,
    under `mlp.` (class BertForCL or RobertaForCL of both repositories). Weights come from
    safetensors, or from a pickle read with `weights_only=True`: no code in it can run.

    Args:
        checkpoint: the folder the trainer wrote, or a weight file.
        encoder: gives architecture and tokenizer; by default the checkpoint's own folder.
        pooling: of the training; only "cls" has a head.

    InputError: no weights, a pickle with more than tensors, or what does not fit the encoder."""
    path = Path(checkpoint)
    if is_folder(path):
        found = [path / name for name in _WEIGHT_FILES if is_file(path / name)]
        if not found:
            raise InputError(f"{path} has no weights: expected {' or '.join(_WEIGHT_FILES)}")
        path = found[0]
    if not is_file(path):
        raise InputError(f"checkpoint {path} is not there: name a folder or a weight file")
    if encoder is None and not is_file(path.parent / "config.json"):
        raise InputError(f"no config.json beside {path}: name the encoder it was trained from")
    # Before the encoder: a folder's own weights are the checkpoint, and this says what is wrong.
    state = {name.removeprefix("module."): x for name, x in _read_weights(path).items()}
    result = SentenceEncoder.from_pretrained(encoder or path.parent, pooling)

    prefix = f"{result.backbone.base_model_prefix}."
    heads = {name: x for name, x in state.items() if _HEAD.fullmatch(name)}
    head = {name.split(".")[-1]: x for name, x in heads.items()}
    state = {name.removeprefix(prefix): x for name, x in state.items() if not _HEAD.match(name)}
    state = {name: x for name, x in state.items() if not _IGNORED.match(name)}
    if pooling == "cls" and not head:
        raise InputError(
            f"{path} has no MLP head (mlp.*.weight): a plain encoder needs no import; for one "
            "trained without a head name its pooling"
        )
    if pooling == "cls" and len(head) < len(heads):
        raise InputError(f"{path} has a head of several layers ({', '.join(heads)}): one is read")
    _load(result.backbone, state, path)
    if pooling == "cls":
        _load(result.head[0], head, path)
    return result


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{path} holds more than tensors, or is no checkpoint, and is not unpickled: convert "
            "its state dict to safetensors where you trust it"
        ) from None
    except Exception as error:  # a dozen types for bytes that are broken somewhere
        raise InputError(f"{path} cannot be read as weights ({first_line(error)})") from None
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(x, Tensor) for x in state.values()):
        raise InputError(f"{path} is no state dict: expected names with tensors")
    return state


def _load(module: torch.nn.Module, state: dict[str, Tensor], path: Path) -> None:
    expected = {name: x.shape for name, x in module.state_dict().items()}
    given = {name: x.shape for name, x in state.items()}
    wrong = [name for name in expected | given if expected.get(name) != given.get(name)]
    if wrong:
        name = wrong[0]
        what = [tuple(x[name]) if name in x else "nothing" for x in (given, expected)]
        raise InputError(
            f"{path} does not fit the encoder in {len(wrong)} weights, the first {name} "
            f"(it holds {what[0]}, expected {what[1]}): name the encoder it was trained from"
        )
    module.load_state_dict(state)
