"""How folders in the layout of sentence-transformers declare their pooling."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig
from transformers.utils import cached_file

from fcse.encoder.pooling import Pooling
from fcse.errors import InputError

_TYPE = "sentence_transformers.models."
_LAYER_DIR, _POOLING_DIR = "1_WeightedLayerPooling", "1_Pooling"
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""The older spelling of `pooling_mode`, which every version of sentence-transformers reads."""


def layers_read(pooling: Pooling, layers: int) -> tuple[int, int]:
    """The two of the `layers + 1` hidden states (0: embeddings) that a two-layer mean averages."""
    return (1 if pooling == "mean_first_last" else layers - 1), layers


def read_layout(name_or_path: str, local_files_only: bool) -> tuple[str, str | None]:
    """What a model folder or hub name says of itself, by modules.json and the folders named there.

    Returns: The folder in it that holds backbone and tokenizer ("" for the top), and the pooling
    that it declares: one of `Pooling`, the name of what we do not read, or None. InputError: one of
    these files is no valid JSON or lacks what it should hold."""

    def find(filename: str) -> Path | None:
        found = cached_file(
            name_or_path,
            filename,
            local_files_only=local_files_only,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return Path(found) if found else None

    def read(path: Path | None) -> Any:
        return json.loads(path.read_text(encoding="utf-8")) if path else None

    try:
        modules = find("modules.json")
        if modules is None:
            return "", None
        folders = {part["type"].rsplit(".", 1)[-1]: part["path"] for part in read(modules)}
        subfolder = folders.pop("Transformer", "")
        folders.pop("Normalize", None)  # leaves every cosine as it is
        foreign = folders.keys() - {"Pooling", "WeightedLayerPooling"}
        if foreign or "Pooling" not in folders:
            return subfolder, " + ".join(folders) or "no pooling"
        pooling = _mode(read(find(f"{folders['Pooling']}/config.json")))
        if "WeightedLayerPooling" in folders:
            folder = folders["WeightedLayerPooling"]
            weights = find(f"{folder}/model.safetensors")
            pooling = _two_layers(read(find(f"{folder}/config.json")), pooling, weights)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        raise InputError(
            f"the pooling that {name_or_path} declares cannot be read: mend its modules.json or "
            "the folders named there"
        ) from None
    return subfolder, pooling


def _mode(config: dict[str, Any]) -> str:
    mode = config.get("pooling_mode")
    if mode is None:
        mode = [name for flag, name in _FLAGS.items() if config.get(flag)]
    mode = mode if isinstance(mode, str) else " + ".join(mode)
    if not mode:
        raise ValueError("no mode is declared")
    return mode


def _two_layers(config: dict[str, Any], mode: str, weights: Path | None) -> str:
    layers = config["num_hidden_layers"]
    by_layer = load_file(weights)["layer_weights"] if weights else torch.ones(0)
    share = torch.zeros(layers + 1)
    share[layers + 1 - len(by_layer) :] = by_layer / by_layer.sum()
    for pooling in ("mean_first_last", "mean_top2"):
        expected = torch.zeros(layers + 1)
        expected[list(layers_read(pooling, layers))] = 0.5
        if mode == "mean" and torch.equal(share, expected / expected.sum()):
            return pooling
    return f"WeightedLayerPooling + {mode}"


def write_layout(folder: Path, pooling: Pooling, model: PretrainedConfig, max_length: int) -> None:
    """Write what `SentenceTransformer(folder)` needs to pool as we do; no module normalises."""
    modules, width = {"Transformer": ""}, {"word_embedding_dimension": model.hidden_size}
    config: dict[str, Any] = {"max_seq_length": max_length, "do_lower_case": False}
    if pooling in ("mean_first_last", "mean_top2"):
        modules["WeightedLayerPooling"] = _LAYER_DIR
        config["config_args"] = {"output_hidden_states": True}
        layers = model.num_hidden_layers
        first, last = layers_read(pooling, layers)
        weights = torch.zeros(layers + 1 - first)
        weights[[0, last - first]] = 1
        read = {"layer_start": first, "num_hidden_layers": layers}
        _write(folder / _LAYER_DIR / "config.json", width | read)
        save_file({"layer_weights": weights}, folder / _LAYER_DIR / "model.safetensors")
    modules["Pooling"] = _POOLING_DIR
    ours = "cls" if pooling == "cls" else "mean"
    modes = {flag: mode == ours for flag, mode in _FLAGS.items()}
    _write(folder / _POOLING_DIR / "config.json", width | modes)
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": _TYPE + kind}
        for i, (kind, path) in enumerate(modules.items())
    ]
    _write(folder / "modules.json", listed)
    _write(folder / "sentence_bert_config.json", config)


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
