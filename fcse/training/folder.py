"""The folder of a run: run.json, metrics.jsonl and model/, written once and never overwritten."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from fcse.config import recorded
from fcse.encoder.card import write_card
from fcse.encoder.sentence_encoder import SentenceEncoder
from fcse.errors import InputError, replacing, writing

_RECORD, _METRICS, _MODEL, _CHECKPOINTS = "run.json", "metrics.jsonl", "model", "checkpoints"
_RESUME, _TENSORS, _FACTS = "resume", "state.safetensors", "state.json"
_LOCK = ".lock"


@dataclass(frozen=True)
class State:
    """Everything a run needs to go on after a step: tensors by name, and plain facts."""

    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class RunFolder:
    """One run's folder, bound to the identity of that run: parts with names and values.

    With no identity it may hold any run."""

    def __init__(self, path: Path, identity: dict[str, dict[str, Any]]) -> None:
        self.path = path
        self.model = path / _MODEL
        self.identity = identity
        self._lock = FileLock(path / _LOCK)

    def record(self) -> dict[str, Any] | None:
        """What run.json holds once this very run has finished, else None; InputError: another."""
        try:
            if not self.path.exists():
                return None
        except OSError as error:  # a name that is too long, a parent that may not be read
            raise InputError(f"output {self.path} cannot be read: {error.strerror}") from None
        if not self.path.is_dir():
            raise InputError(f"output {self.path} is a file: name a folder")
        if all(path.name == _LOCK for path in self.path.iterdir()):
            return None
        way_out = "name another output folder, or delete this one"
        try:
            record = json.loads((self.path / _RECORD).read_text())
        except FileNotFoundError:
            raise InputError(f"output {self.path} holds files that are no run: {way_out}") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise InputError(f"{self.path / _RECORD} is no valid JSON: {way_out}") from None
        except OSError as error:
            raise InputError(f"{self.path / _RECORD}: {error.strerror}; {way_out}") from None
        if not isinstance(record, dict):
            raise InputError(f"{self.path / _RECORD} is no record of a run: {way_out}")
        for part, ours in self.identity.items():
            theirs = record.get(part)
            theirs = theirs if isinstance(theirs, dict) else {}
            if part == "config":
                theirs = _as_today(theirs, record.get("precision"))
            differing = [k for k in ours.keys() | theirs.keys() if theirs.get(k) != ours.get(k)]
            if differing:
                raise InputError(
                    f"output {self.path} holds another run (other {', '.join(sorted(differing))}): "
                    f"{way_out}"
                )
        return record if record.get("finished") else None

    def claim(self) -> None:
        """Make the folder this process' own, once another that trains the run has ended.

        So two notebooks that are run at once train what both show only once."""
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                said = f"{self.path} is being trained by another process: waiting for it"
                tqdm.write(said, file=sys.stderr)
                self._lock.acquire()

    def release(self) -> None:
        """Let others have the folder; harmless where it was not claimed."""
        self._lock.release()

    def start(self) -> State | None:
        """Cut the folder back to its last whole state, which it returns; else empty it."""
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            state = self.last_state()
            if state is None:
                (self.path / _METRICS).unlink(missing_ok=True)
                for folder in (_MODEL, _CHECKPOINTS, _RESUME):
                    shutil.rmtree(self.path / folder, ignore_errors=True)
            else:
                os.truncate(self.path / _METRICS, state.facts["metrics_bytes"])
            self._write_record(self.identity | {"finished": False})
        return state

    def log(self, **numbers: float) -> None:
        """Append one line to metrics.jsonl."""
        with self._writing(), (self.path / _METRICS).open("a") as file:
            file.write(json.dumps(numbers) + "\n")

    def metrics(self) -> tuple[list[float], list[dict[str, float]]]:
        """What metrics.jsonl holds so far: the loss of each step, and a dict each scoring."""
        lines = [json.loads(line) for line in (self.path / _METRICS).read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        return losses, [line for line in lines if "loss" not in line]

    def keep(self, encoder: SentenceEncoder) -> None:
        """Make this encoder the run's model."""
        with self._writing(), replacing(self.model) as model:
            encoder.save_pretrained(model)

    def keep_checkpoint(self, step: int, encoder: SentenceEncoder) -> None:
        """Keep the weights of a step beside the model, in half precision."""
        weights = {k: x.detach().cpu().half().contiguous() for k, x in encoder.state_dict().items()}
        folder = self.path / _CHECKPOINTS
        with self._writing():
            folder.mkdir(exist_ok=True)
            with replacing(folder / f"{step}.safetensors") as path:
                save_file(weights, path)

    def checkpoints(self) -> dict[int, Path]:
        """Step -> file of its weights, in the order of the steps."""
        found = (self.path / _CHECKPOINTS).glob("*.safetensors")
        return {int(path.stem): path for path in sorted(found, key=lambda path: int(path.stem))}

    def keep_state(self, state: State) -> None:
        """Write what the run needs to go on, whole or not at all; the last two are kept."""
        folder = self.path / _RESUME
        metrics_bytes = (self.path / _METRICS).stat().st_size
        with self._writing(), replacing(folder / str(state.step)) as partial:
            partial.mkdir(parents=True)
            save_file(state.tensors, partial / _TENSORS)
            facts = json.dumps(state.facts | {"metrics_bytes": metrics_bytes})
            (partial / _FACTS).write_text(facts)
        for step in self.states()[2:]:
            shutil.rmtree(folder / str(step), ignore_errors=True)

    def keep_batch(self, step: int, sentences: Sequence[str]) -> Path:
        """Write the sentences of a step to a file, one a line."""
        path = self.path / f"batch_of_step_{step}.txt"
        with self._writing():
            path.write_text("\n".join(sentences) + "\n", encoding="utf-8")
        return path

    def last_state(self) -> State | None:
        """The newest whole state that was kept, None without one."""
        for step in self.states():
            folder = self.path / _RESUME / str(step)
            try:
                facts = json.loads((folder / _FACTS).read_text())
                return State(step, load_file(folder / _TENSORS), facts)
            except (OSError, ValueError, SafetensorError):  # a machine that went down mid-write
                continue
        return None

    def states(self) -> list[int]:
        """The steps whose states there are, newest first."""
        found = (self.path / _RESUME).glob("*")
        return sorted((int(path.name) for path in found if path.name.isdecimal()), reverse=True)

    def finish(self, **facts: Any) -> None:
        """Write the model card and the final run.json: identity and what came out."""
        record = self.identity | facts
        with self._writing():
            write_card(self.model, record)
            self._write_record(record | {"finished": True})

    def drop_states(self) -> None:
        """Remove what only an unfinished run needs."""
        shutil.rmtree(self.path / _RESUME, ignore_errors=True)
        with suppress(OSError):
            (self.path / _LOCK).unlink(missing_ok=True)

    def drop_models(self) -> None:
        """Remove all weights; record and metrics stay, and the run can be trained again."""
        for folder in (self.model, self.path / _CHECKPOINTS):
            shutil.rmtree(folder, ignore_errors=True)

    def _writing(self) -> AbstractContextManager[None]:
        way_out = "mend that, and the same command goes on from the last whole state"
        return writing(f"run {self.path}", way_out)

    def _write_record(self, record: dict[str, Any]) -> None:
        with replacing(self.path / _RECORD) as path:
            path.write_text(json.dumps(record, indent=1) + "\n")


def _as_today(settings: dict[str, Any], precision: str | None) -> dict[str, Any]:
    """The settings of a record as a run of today has them: a field it lacks is at its default.

    precision: the one that was taken, which settings once did not say where they said "auto"."""
    try:
        settings = recorded(settings).settings
        return settings | {"precision": precision or settings["precision"]}
    except (InputError, TypeError, KeyError, AttributeError):
        return settings
