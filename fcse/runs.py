"""The folder of a run: run.json, metrics.jsonl and model/, written once and never overwritten."""

import hashlib
import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fcse.cards import write_card
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError

_RECORD, _METRICS, _MODEL, _CHECKPOINTS = "run.json", "metrics.jsonl", "model", "checkpoints"


def versions() -> dict[str, str]:
    """The versions a run depends on; a run is only reused where they are the same."""
    packages = {name: version(name) for name in ("fcse", "torch", "transformers", "accelerate")}
    return {"python": platform.python_version()} | packages


def weights_hash(module: nn.Module) -> str:
    """Hexadecimal SHA-256 over the names and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class RunFolder:
    """One run's folder, bound to the identity of that run: parts with names and values."""

    def __init__(self, path: Path, identity: dict[str, dict[str, Any]]) -> None:
        self.path = path
        self.model = path / _MODEL
        self.identity = identity

    def record(self) -> dict[str, Any] | None:
        """What run.json holds once this very run has finished, else None.

        Raises:
            InputError: the folder holds another run, or something that is no run.
        """
        try:
            if not self.path.exists():
                return None
        except OSError as error:  # a name that is too long, a parent that may not be read
            raise InputError(f"output {self.path} cannot be read: {error.strerror}") from None
        if not self.path.is_dir():
            raise InputError(f"output {self.path} is a file: name a folder")
        if not any(self.path.iterdir()):
            return None
        way_out = "name another output folder, or delete this one"
        try:
            record = json.loads((self.path / _RECORD).read_text())
        except FileNotFoundError:
            raise InputError(f"output {self.path} holds files that are no run: {way_out}") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise InputError(f"{self.path / _RECORD} is no valid JSON: {way_out}") from None
        for part, ours in self.identity.items():
            theirs = record.get(part) if isinstance(record, dict) else None
            theirs = theirs if isinstance(theirs, dict) else {}
            differing = [k for k in ours.keys() | theirs.keys() if theirs.get(k) != ours.get(k)]
            if differing:
                raise InputError(
                    f"output {self.path} holds another run (other {', '.join(sorted(differing))}): "
                    f"{way_out}"
                )
        return record if record.get("finished") else None

    def start(self) -> None:
        """Make the folder ready; what an interrupted try of the same run left is removed."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / _METRICS).unlink(missing_ok=True)
            shutil.rmtree(self.model, ignore_errors=True)
            shutil.rmtree(self.path / _CHECKPOINTS, ignore_errors=True)
            self._write_record(self.identity | {"finished": False})
        except OSError as error:
            raise InputError(f"output {self.path} cannot be written: {error.strerror}") from None

    def log(self, **numbers: float) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / _METRICS).open("a") as file:
            file.write(json.dumps(numbers) + "\n")

    def metrics(self) -> tuple[list[float], list[dict[str, float]]]:
        """What metrics.jsonl holds so far: the loss of each step, and a dict each scoring."""
        lines = [json.loads(line) for line in (self.path / _METRICS).read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        return losses, [line for line in lines if "loss" not in line]

    def keep(self, encoder: SentenceEncoder) -> None:
        """Make this encoder the run's model."""
        partial = self.path / f"{_MODEL}.partial"
        encoder.save_pretrained(partial)
        shutil.rmtree(self.model, ignore_errors=True)
        partial.rename(self.model)

    def keep_checkpoint(self, step: int, encoder: SentenceEncoder) -> None:
        """Keep the weights of a step beside the model, in half precision."""
        folder = self.path / _CHECKPOINTS
        folder.mkdir(exist_ok=True)
        weights = {k: x.detach().cpu().half().contiguous() for k, x in encoder.state_dict().items()}
        save_file(weights, folder / f"{step}.safetensors")

    def checkpoints(self) -> dict[int, Path]:
        """Step -> file of its weights, in the order of the steps."""
        found = (self.path / _CHECKPOINTS).glob("*.safetensors")
        return {int(path.stem): path for path in sorted(found, key=lambda path: int(path.stem))}

    def finish(self, **facts: Any) -> None:
        """Write the model card and the final run.json: identity and what came out."""
        record = self.identity | facts
        write_card(self.model, record)
        self._write_record(record | {"finished": True})

    def _write_record(self, record: dict[str, Any]) -> None:
        partial = self.path / f"{_RECORD}.partial"
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.rename(self.path / _RECORD)
