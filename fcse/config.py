"""Everything that decides a run: fields with their ranges, and the run's identity and name."""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fcse import losses
from fcse.data import is_file, is_folder, sha256
from fcse.errors import InputError
from fcse.neighbours.options import OFF, SETTINGS, Neighbour
from fcse.pooling import Pooling
from fcse.runs import versions

Metric = Literal["last", "lee", "stsb_dev"]
Precision = Literal["auto", "bf16", "float32"]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; two runs with equal fields and versions are the same run.

    Raises:
        InputError: a field is out of its range.
    """

    recipe: str | None = None
    """Name of the recipe the other fields started from; a label, see `fcse.recipes`."""
    objective: Literal[losses.Objective, Neighbour] = "focal_info_nce"
    """The loss: info_nce (SimCSE), focal_info_nce (Hou & Li 2023), hardness_info_nce (Lan et al.
    2025), or InfoNCE with the settings that a neighbour's name stands for, see
    `neighbours.options`."""
    encoder: str | Path = "minilm"
    """Where to start: minilm (packaged), a model folder, or a hub name."""
    corpus: str | Path = "wiki-mini"
    """What to train on: wiki-mini (packaged), wiki1m (hub), a text file, or DATASET:COLUMN."""
    temperature: float = 0.05
    """tau > 0, the divisor of the logits."""
    m: float = 0.3
    """Shift of the negatives' modulation s * (s + m); used by focal_info_nce only."""
    modulate: losses.Modulate = "both"
    """Which logits focal_info_nce modulates: both, positive, negative or none."""
    stop_gradient: bool = False
    """Take focal_info_nce's modulating factors as constants; the authors do not."""
    alpha: float = losses.ALPHA
    """Hardness weight >= 0 of hardness_info_nce."""
    pooling: Pooling = "cls"
    """How tokens become a sentence vector: cls, mean, mean_first_last or mean_top2."""
    batch_size: int = 64
    """Sentences a step over all processes, N >= 2; each meets N - 1 negatives."""
    micro_batch_size: int | None = None
    """Sentences whose graph is held at a time, >= 1: less memory, one more pass; else all."""
    mask_duplicates: bool = True
    """Leave out negatives that are the anchor's own sentence again; the authors do not."""
    layers: int | None = None
    """Layers below the last whose vectors join as negatives (SSCL), >= 0."""
    neighbours: int | None = None
    """Nearest sentences of the corpus, of which each sentence brings one as a negative (CARDS)."""
    case_switch: float | None = None
    """Share of words whose first letter changes case in the second view, 0 to 1 (CARDS)."""
    margin: float | None = None
    """Radians, 0 to pi/2, by which negatives the teacher finds unlike come closer (AdapACSE)."""
    teacher: str | Path = "minilm"
    """Encoder whose mean readout sizes the margin: minilm, a model folder or a hub name."""
    acceptance: float | None = None
    """Share of pseudo-labels kept at the end, 0 to 1; equal ones make no negatives (IFND)."""
    clusters: int = 500
    """Clusters that give the pseudo-labels, >= 2."""
    cluster_steps: int | None = None
    """Cluster the corpus anew every so many steps, >= 1; else every quarter of the run, at most
    200."""
    focal_weight: bool | None = None
    """Weigh a row's loss by 1 - its positive's probability (Core-tuning)."""
    mixing: bool | None = None
    """Add harder positives and negatives, mixed from a row's own (Core-tuning)."""
    detection: float | None = None
    """Weight of replaced-token detection beside the loss, >= 0 (DiffCSE)."""
    generator: str | Path | None = None
    """Masked language model that replaces tokens; None draws them from the corpus' unigrams."""
    steps: int = 100
    """Optimiser steps, >= 1; the corpus is reshuffled each time it runs out."""
    learning_rate: float = 3e-5
    """Peak of AdamW's learning rate, > 0, decaying linearly to 0."""
    max_length: int = 32
    """Tokens kept of each training sentence, >= 3; evaluation does not cut."""
    seed: int = 0
    """Seed of head, data order and dropout, 0 to 2**32 - 1."""
    precision: Precision = "auto"
    """bf16 (autocast), float32, or auto: bf16 where the hardware has bf16 matrix units."""
    eval_steps: int = 25
    """Score every so many steps, >= 1."""
    metric: Metric = "last"
    """Which weights to keep: those of the last step, or of the best lee or stsb_dev score."""
    checkpoints: bool = False
    """Keep the weights of every scoring along the way too, in half precision."""
    output: str | Path | None = None
    """Folder of the run; by default a folder of its own under FCSE_RUNS, else under runs/."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("objective", Literal[losses.Objective, Neighbour]),
            ("pooling", Pooling),
            ("precision", Precision),
            ("metric", Metric),
        ):
            if getattr(self, name) not in get_args(choices):
                raise InputError(
                    f"unknown {name} {getattr(self, name)!r}: "
                    f"choose from {', '.join(get_args(choices))}"
                )
        try:
            losses.check_parameters(
                self.temperature, self.m, self.modulate, self.alpha, self.option("margin")
            )
        except ValueError as error:
            raise InputError(str(error)) from None
        for name, least in (
            ("batch_size", 2),
            ("micro_batch_size", 1),
            ("steps", 1),
            ("max_length", 3),
            ("seed", 0),
            ("eval_steps", 1),
            ("layers", 0),
            ("neighbours", 0),
            ("clusters", 2),
            ("cluster_steps", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, got {value}")
        if self.seed >= 2**32:
            raise InputError(f"seed must be below 2**32, got {self.seed}")
        if not 0 < self.learning_rate < 1:
            raise InputError(f"learning_rate must lie between 0 and 1, got {self.learning_rate}")
        for name in ("case_switch", "acceptance"):
            if not 0 <= self.option(name) <= 1:
                raise InputError(f"{name} must lie between 0 and 1, got {self.option(name)}")
        if not 0 <= self.option("detection") < math.inf:
            raise InputError(
                f"detection must be a finite number of at least 0, got {self.detection}"
            )
        if self.option("mixing") and (self.option("layers") or self.option("neighbours")):
            raise InputError(
                "mixing takes each row's own negatives, layers and neighbours add some for all "
                "rows: set mixing to false, or layers and neighbours to 0"
            )
        if self.option("detection") and self.micro_batch_size:
            raise InputError(
                "detection needs a batch in one pass: leave out micro_batch_size, or set "
                "detection to 0"
            )

    @property
    def base(self) -> losses.Objective:
        """The objective whose logits are taken: InfoNCE's for a neighbour."""
        return "info_nce" if self.objective in SETTINGS else self.objective

    def option(self, name: str) -> Any:
        """A neighbour's setting: as given, else as the objective's name says, else off."""
        given = getattr(self, name)
        return SETTINGS.get(self.objective, OFF).get(name, OFF[name]) if given is None else given

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the result: the fields but the folder, local files' bytes, versions."""
        fields = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        del fields["output"]
        patterns = ("*.safetensors", "*.bin", "*/model.safetensors")
        models = [self.encoder]
        models += [self.teacher] if self.option("margin") else []
        models += [self.generator] if self.option("detection") and self.generator else []
        folders = [Path(model) for model in models if is_folder(model)]
        found = [path for folder in folders for glob in patterns for path in folder.glob(glob)]
        files = (Path(self.corpus), *sorted(found))
        return {
            "config": fields,
            "files": {str(path): sha256(path) for path in files if is_file(path)},
            "versions": versions(),
        }

    @property
    def name(self) -> str:
        """A folder name that is the same for equal identities only.

        Fields at their defaults have no part in it, so that a field added later renames no run.
        """
        identity = self.identity
        set_ = {k: v for k, v in identity["config"].items() if v != getattr(TrainConfig, k)}
        named = json.dumps(identity | {"config": set_}, sort_keys=True).encode()
        digest = hashlib.sha256(named).hexdigest()[:8]
        return f"{self.key}-seed{self.seed}-{digest}"

    @property
    def key(self) -> str:
        """What figures and tables call this loss: a key of `analysis.VARIANTS`, a neighbour, or
        several of these joined by "+"."""
        modulate = losses.effective_modulation(self.base, self.modulate)
        if self.base == "hardness_info_nce":
            key = self.base
        elif modulate == "none":
            key = "info_nce"
        elif self.stop_gradient:
            key = "stop_gradient"
        else:
            key = "focal_info_nce" if modulate == "both" else modulate
        on = [n for n, settings in SETTINGS.items() if any(map(self.option, settings))]
        return "+".join(on if key == "info_nce" and on else [key, *on])

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.output or Path(os.environ.get("FCSE_RUNS", "runs")) / self.name)
