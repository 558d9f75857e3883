"""The rows of a study's tables: one a run, with all that it takes to make that run again."""

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from fcse.config import PARAMETERS, TrainConfig, recorded
from fcse.data import corpus_reader, is_file, is_folder, text_hash, versions
from fcse.errors import InputError, first_line

SCORES = "scores.json"
"""Where a run's folder keeps the scores of its model."""

IDENTITY = (
    *("contestant", "corpus", "corpus_sha256", "seed", "steps", "batch_size"),
    *("precision", "device", "versions"),
)
"""Columns that say first what a row is of."""


def finished(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, float]]] | None:
    """Record and scores of a run that is trained and scored, else None.

    InputError: files that are no record of a run."""
    try:
        record = json.loads((folder / "run.json").read_text())
        if not record["finished"]:
            return None
        return record, json.loads((folder / SCORES).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, OSError):
        raise _damaged(folder) from None


def _damaged(folder: Path) -> InputError:
    return InputError(f"{folder} holds a damaged record of a run: delete that folder")


def results(folder: Path) -> pd.DataFrame:
    """Every run of a study's folder that is trained and scored, whatever grid asked for it.

    Returns: One row a run: "run" (its folder's name), the columns of `IDENTITY`, every other
    setting by its flat name, empty where a run has none of that name, "wall_time_s" (training in
    s), "kept_step", and for each task its score (100 x Spearman), TASK_alignment and
    TASK_uniformity. "contestant" is the name of the loss, see `TrainConfig.name`; "corpus" a
    file's name without its folder; "corpus_sha256" that of its sentences, see `data.text_hash`;
    "device" also says what hardware it is. InputError: a record that cannot be read."""
    rows = []
    for path in sorted(folder.glob("runs/*/run.json")):
        if (run := finished(path.parent)) is not None:
            try:
                rows.append({"run": path.parent.name} | _row(*run))
            except (KeyError, TypeError, AttributeError, ValueError):
                raise _damaged(path.parent) from None
    return pd.DataFrame(rows, dtype=object)


def _row(record: Mapping[str, Any], scores: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    config = recorded(record["config"])
    corpus = str(config.corpus)
    found = dict.fromkeys(IDENTITY) | config.settings
    found |= {
        "contestant": config.name,
        "corpus": Path(corpus).name if corpus in record["files"] else corpus,
        "corpus_sha256": record["corpus"]["sha256"],
        "precision": record["precision"],
        "device": ": ".join(filter(None, (record["device"], record.get("hardware")))),
        "versions": ", ".join(f"{name} {x}" for name, x in record["versions"].items()),
    }
    found |= {name: record[name] for name in ("wall_time_s", "kept_step")}
    for task, kinds in scores.items():
        found |= {f"{task}_{kind}".removesuffix("_spearman"): kinds[kind] for kind in kinds}
    return found


def read_rows(path: Path) -> pd.DataFrame:
    """The rows of a table as text, "" where a cell is empty. InputError: it is no such table."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no table of a study: {first_line(error)}") from None
    if missing := [column for column in ("run", *IDENTITY) if column not in table]:
        raise InputError(f"{path} is no table of a study: it has no column {missing[0]}")
    return table


def joined(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    """Rows of `results` and `read_rows` as text, one a run: that of the first table it is in."""
    texts = [io.StringIO(table.to_csv(index=False)) for table in tables if len(table)]
    read = [pd.read_csv(text, dtype=str, keep_default_na=False) for text in texts]
    rows = pd.concat(read or [pd.DataFrame()], ignore_index=True).fillna("")
    if rows.empty:
        return rows
    first = ~pd.Series([*map(what_it_is, rows.to_dict("records"))]).duplicated()
    return rows[first.to_numpy()].sort_values("run", ignore_index=True)


def config_of(row: Mapping[str, str]) -> TrainConfig:
    """The config of a row of `read_rows`; its corpus, where that is a file, without its folder.

    InputError: settings that are none."""
    known = {f.name for f in fields(TrainConfig)} | {*PARAMETERS}
    settings = {k: _value(x) for k, x in row.items() if x and (k in known or "." in k)}
    try:
        return recorded(settings)
    except (KeyError, TypeError) as error:
        raise InputError(f"row {row['run']} holds no settings of a run: {error}") from None


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return {"True": True, "False": False}.get(text, text)


def fcse_version(row: Mapping[str, str]) -> str:
    """The version of the kit that made a row; "" where it does not say."""
    return next(iter(re.findall(r"\bfcse ([^,]+)", row["versions"])), "")


def what_it_is(row: Mapping[str, str]) -> tuple[TrainConfig, str]:
    """What a row is a result of: equal for equal rows, on whatever machine they were made.

    That is its settings, the bytes of its corpus, and the version of the kit."""
    return _anywhere(config_of(row), row["corpus_sha256"]), fcse_version(row)


def _anywhere(config: TrainConfig, corpus_sha256: str) -> TrainConfig:
    return replace(config, recipe=None, output=None, corpus=corpus_sha256)


def current_rows(path: Path | None) -> pd.DataFrame:
    """The rows of a table that this version of the kit made; none where there is no such file.

    InputError: it is no table of a study."""
    if path is None or not is_file(path):
        return pd.DataFrame()
    rows, ours = read_rows(path), versions()["fcse"]
    return rows[[fcse_version(row) == ours for row in rows.to_dict("records")]]


def not_in(
    rows: pd.DataFrame, runs: Iterable[TrainConfig], tasks: Sequence[str]
) -> list[TrainConfig]:
    """The runs that have none of these rows, of `current_rows`, with scores on all these tasks.

    A run whose encoder, or a method's, is a folder of this machine has no row on another. Errors of
    `data.corpus_reader`."""
    scored = [row for row in rows.to_dict("records") if all(row.get(task) for task in tasks)]
    done = {what_it_is(row) for row in scored}
    hash_of, ours = cache(corpus_sha256), versions()["fcse"]
    missing = []
    for run in runs:
        models = (run.encoder, *(file for method in run.methods for file in method.files()))
        known = done and (_anywhere(run, hash_of(str(run.corpus))), ours) in done
        if not known or any(map(is_folder, models)):
            missing.append(run)
    return missing


def corpus_sha256(name_or_path: str | Path) -> str:
    """The hash of a corpus's sentences; errors of `data.corpus_reader`."""
    return text_hash(corpus_reader(name_or_path)())
