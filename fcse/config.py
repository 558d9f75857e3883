"""Everything that decides a run: its settings, their names and ranges, its identity and its name.

Settings are known by flat names, the same on the command line, in TOML and in a run's record: the
fields of `TrainConfig`, an objective's parameters (`temperature`, `m`), and a method's settings
behind its key (`sscl.layers`). `objective` names the objective and the methods that are on, joined
by "+": focal_info_nce+sscl."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fcse import methods, objectives
from fcse.data import is_file, is_folder, runs_folder, sha256, versions
from fcse.encoder.pooling import Pooling
from fcse.encoder.precision import Precision, resolve_precision
from fcse.errors import InputError
from fcse.objectives import OBJECTIVES, FocalInfoNCE, InfoNCE, Recorded, key, named, parameters

Metric = Literal["last", "lee", "stsb_dev"]

_PRECISIONS = ("precision", "score_precision")
_LEAST = dict(batch_size=2, micro_batch_size=1, steps=1, max_length=3, seed=0, eval_steps=1)
_CHOICES = {"pooling": Pooling, "metric": Metric} | dict.fromkeys(_PRECISIONS, Precision)

PARAMETERS = {f.name: kind for kind in OBJECTIVES.values() for f in fields(kind)}
"""Parameter of one of the kit's objectives -> an objective that has it."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; two runs with equal fields and versions are the same run.

    InputError: a field is out of its range, or two do not go together."""

    recipe: str | None = None
    """Name of the recipe the other fields started from; a label, see `fcse.recipes`."""
    objective: Any = field(default_factory=FocalInfoNCE)
    """The loss: an objective by its name or as a value, see `fcse.objectives`. Names of methods may
    join it: sscl stands for info_nce+sscl."""
    methods: tuple[Any, ...] = ()
    """Methods around the loss, see `fcse.methods`; those that change nothing are left out."""
    encoder: str | Path = "minilm"
    """Where to start: minilm (packaged), a model folder, or a hub name."""
    corpus: str | Path = "wiki-mini"
    """What to train on: wiki-mini (packaged), wiki1m (hub), a text file, or DATASET:COLUMN."""
    pooling: Pooling = "cls"
    """How tokens become a sentence vector: cls, mean, mean_first_last or mean_top2."""
    batch_size: int = 64
    """Sentences a step over all processes, N >= 2; each meets N - 1 negatives."""
    micro_batch_size: int | None = None
    """Sentences whose graph is held at a time, >= 1: less memory, one more pass; else all."""
    mask_duplicates: bool = True
    """Leave out negatives that are the anchor's own sentence again; the authors do not."""
    steps: int = 100
    """Optimiser steps, >= 1; the corpus is reshuffled each time it runs out."""
    learning_rate: float = 3e-5
    """Peak of AdamW's learning rate, > 0, decaying linearly to 0."""
    max_length: int = 32
    """Tokens kept of each training sentence, >= 3; evaluation does not cut."""
    seed: int = 0
    """Seed of head, data order and dropout, 0 to 2**32 - 1."""
    precision: Precision = "auto"
    """Of training: bf16, float32, or auto: bf16 where the hardware has units for it."""
    score_precision: Precision = "float32"
    """Of the scores along the way and of a study's tasks, likewise."""
    eval_steps: int = 25
    """Score every so many steps, >= 1."""
    metric: Metric = "last"
    """Which weights to keep: those of the last step, or of the best lee or stsb_dev score."""
    checkpoints: bool = False
    """Keep the weights of every scoring along the way too, in half precision."""
    output: str | Path | None = None
    """Folder of the run; by default a folder of its own under FCSE_RUNS, else under runs/."""

    def __post_init__(self) -> None:
        objective, on = self.objective, {}
        if isinstance(objective, str):
            objective, on = parse(objective)
        on |= {method.key: method for method in self.methods}
        objective = named(objective)
        objective = getattr(objective, "canonical", lambda: objective)()
        object.__setattr__(self, "objective", objective)
        for method in on.values():
            if (start := method.starts_from) is not None:
                if str(self.encoder) not in (TrainConfig.encoder, start):
                    raise InputError(f"{method.key} starts from {start}: leave out the encoder")
                object.__setattr__(self, "encoder", start)
        fitted = (on[key].fitted(self.encoder) for key in sorted(on))
        object.__setattr__(self, "methods", tuple(method for method in fitted if method.on))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                said = ", ".join(get_args(choices))
                raise InputError(f"unknown {name} {getattr(self, name)!r}: choose from {said}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        if self.seed >= 2**32:
            raise InputError(f"seed must be below 2**32, got {self.seed}")
        if not 0 < self.learning_rate < 1:
            raise InputError(f"learning_rate must lie between 0 and 1, got {self.learning_rate}")
        for method in self.methods:
            method.check(self)

    @property
    def name(self) -> str:
        """What tables and figures call the loss: of all that objective and methods hold."""
        return " + ".join(map(objectives.name, (self.objective, *self.methods)))

    @property
    def settings(self) -> dict[str, Any]:
        """The config by flat names, as TOML and a run's record have it; all but the folder.

        A reader's own class has its printed name and a digest of what it does beside its fields."""
        found: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "objective":
                parts = (value, *self.methods)
                found["objective"] = "+".join(map(key, parts))
                found |= {k: v for part in parts for k, v in _of_part(part).items()}
            elif f.name not in ("methods", "output"):
                found[f.name] = str(value) if isinstance(value, Path) else value
        return found

    @property
    def precisions(self) -> dict[str, Precision]:
        """The precisions as this machine takes them, by their names."""
        return {name: resolve_precision(getattr(self, name)) for name in _PRECISIONS}

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result: the settings, local files' bytes, versions.

        A precision is what "auto" means on this machine."""
        patterns = ("*.safetensors", "*.bin", "*/model.safetensors")
        models = [self.encoder, *(file for method in self.methods for file in method.files())]
        folders = [Path(model) for model in models if is_folder(model)]
        found = [path for folder in folders for glob in patterns for path in folder.glob(glob)]
        files = (Path(self.corpus), *sorted(found))
        return {
            "config": self.settings | self.precisions,
            "files": {str(path): sha256(path) for path in files if is_file(path)},
            "versions": versions(),
        }

    @property
    def run_name(self) -> str:
        """A folder name that is the same for equal identities only.

        Settings at their defaults have no part in it, so that one added later renames no run."""
        identity, kits = self.identity, (*OBJECTIVES, *methods.names())
        parts = [part for part in identity["config"]["objective"].split("+") if part in kits]
        objective, on = parse("+".join(parts) or "info_nce")
        usual = {f.name: f.default for f in fields(self)}
        usual |= {k: v for part in (objective, *on.values()) for k, v in _of_part(part).items()}
        set_ = {k: v for k, v in identity["config"].items() if k not in usual or v != usual[k]}
        ours = json.dumps(identity | {"config": set_}, sort_keys=True).encode()
        digest = hashlib.sha256(ours).hexdigest()[:8]
        return f"{identity['config']['objective']}-seed{self.seed}-{digest}"

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.output or runs_folder() / self.run_name)


def _of_part(part: Any) -> dict[str, Any]:
    """An objective's or a method's own settings, by flat names."""
    if isinstance(part, Recorded):
        return {f"{part.key}.{k}": v for k, v in part.parameters}
    if type(part) in OBJECTIVES.values():
        return parameters(part)
    own = parameters(part)
    if not type(part).__module__.startswith(f"{methods.__name__}."):
        own = json.loads(json.dumps(own, default=repr))  # as it comes back from a record
        own |= {"printed": objectives.name(part), "code": objectives.code(type(part))}
    return {f"{key(part)}.{k}": v for k, v in own.items()}


def parse(text: str) -> tuple[Any, dict[str, methods.Method]]:
    """The objective and the methods that a name such as focal_info_nce+sscl stands for."""
    parts = text.split("+")
    for part in parts:
        if part not in OBJECTIVES and part not in methods.names():
            choices = ", ".join([*OBJECTIVES, *methods.names()])
            raise InputError(f"unknown objective {part!r}: choose from {choices}, joined by +")
    found = [part for part in parts if part in OBJECTIVES]
    if len(found) > 1:
        raise InputError(f"objective {text!r} names {len(found)} objectives: choose one")
    on = {part: methods.method(part)() for part in parts if part not in OBJECTIVES}
    return (OBJECTIVES[found[0]]() if found else InfoNCE()), on


def configured(config: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """A config with settings changed by their flat names: what flags and TOML mean.

    `objective` as a name starts both objective and methods anew. A parameter that the objective
    does not have, such as m for InfoNCE, changes nothing. A method's setting turns it on, with its
    authors' values for the others.

    Args:
        config: what is not named stays as it is here.
        given: flat name -> value; a method's settings may also be a mapping under its key.

    InputError: an unknown name, a value of the wrong type or out of range, or a parameter beside an
    objective that is a value and has its own."""
    flat = flattened(given)
    objective, on = config.objective, {method.key: method for method in config.methods}
    if isinstance(chosen := flat.pop("objective", objective), str):
        objective, on = parse(chosen)
    else:
        objective = named(chosen)
    own = {name: flat.pop(name) for name in PARAMETERS if name in flat}
    own = {name: typed(name, PARAMETERS[name], name, value) for name, value in own.items()}
    said = ", ".join(own)
    if own and type(objective) not in OBJECTIVES.values():
        raise InputError(
            f"{said} beside the objective {objectives.name(objective)}, which has its "
            "own parameters: set them there"
        )
    if own and not isinstance(chosen, str) and "objective" in given:
        raise InputError(f"{said} beside an objective that is a value: set its parameters there")
    has = {f.name for f in fields(objective)}
    objective = replace(objective, **{name: x for name, x in own.items() if name in has})
    rest: dict[str, Any] = {}
    for name, value in flat.items():
        part, dot, setting = name.partition(".")
        if not dot:
            rest[name] = typed(name, TrainConfig, name, value)
        elif part == key(objective):
            value = typed(name, type(objective), setting, value)
            objective = replace(objective, **{setting: value})
        else:
            kind = type(on[part]) if part in on else methods.method(part)
            value = typed(name, kind, setting, value)
            on[part] = replace(on.get(part) or kind(), **{setting: value})
    return replace(config, objective=objective, methods=tuple(on.values()), **rest)


def flattened(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by flat names: sscl.layers for what stands in a mapping under sscl."""
    flat: dict[str, Any] = {}
    for name, value in given.items():
        inner = isinstance(value, Mapping)
        flat |= {f"{name}.{k}": v for k, v in value.items()} if inner else {name: value}
    return flat


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def typed(said: str, kind: type, name: str, value: Any) -> Any:
    """A value as the field of a dataclass takes it: whole numbers become floats where meant.

    said: what the user called the field `name` of the dataclass `kind`. InputError: no such field,
    or a value of another type."""
    every = get_type_hints(kind)
    hints = {f.name: every[f.name] for f in fields(kind) if f.name != "methods"}
    if name not in hints:
        raise InputError(f"unknown key {said!r}: {_way_out(said, kind, hints)}")
    hint = hints[name]
    allowed = (hint, *get_args(hint))
    if isinstance(value, Path) and Path in allowed:
        return value
    if value is None and type(None) in allowed:
        return None
    allowed += (str,) if get_origin(hint) is Literal else ()
    expected = next((k for k in _KINDS if k in allowed), None)
    if expected is None:
        return value
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise InputError(f"{said} must be {_KINDS[expected]}, got {value!r}")
    return value


def _way_out(said: str, kind: type, hints: Mapping[str, Any]) -> str:
    if said in methods.names():
        return f"write {said}.{fields(methods.method(said))[0].name}"
    known = [*hints]
    if kind is TrainConfig:
        known += [*PARAMETERS, *methods.names()]
    near = get_close_matches(said.rpartition(".")[2], known, n=1)
    return f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"


def recorded(record: Mapping[str, Any]) -> TrainConfig:
    """The config of a run from its record.

    Classes that are not the kit's become `Recorded`. InputError, TypeError or KeyError: the record
    is none."""
    record = dict(record)
    parts = record["objective"].split("+")
    foreign = {}
    for part in [part for part in parts if f"{part}.printed" in record]:
        own = {k: record.pop(k) for k in list(record) if k.startswith(f"{part}.")}
        params = tuple((k.removeprefix(f"{part}."), v) for k, v in own.items())
        foreign[part] = Recorded(part, own[f"{part}.printed"], params)
    record["objective"] = "+".join(part for part in parts if part not in foreign) or "info_nce"
    config = configured(TrainConfig(), record)
    objective = foreign.pop(parts[0], config.objective)
    return replace(config, objective=objective, methods=(*config.methods, *foreign.values()))
