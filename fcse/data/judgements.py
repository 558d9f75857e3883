"""Human judgements by name: Lee's documents, packaged, and the STS tasks in SentEval's layout."""

import math
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fcse.data import assets
from fcse.data.assets import cache_folder, download, is_file, sha256
from fcse.errors import InputError, first_line

STS_SUBSETS: dict[str, tuple[str, ...]] = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
"""The yearly tasks and their parts, as SentEval scores them (STS13 without SMT)."""

STS_TASKS = (*STS_SUBSETS, "STSBenchmark", "SICKRelatedness")
"""The seven tasks of the SimCSE line of work, in its order."""

Aggregate = Literal["all", "mean", "wmean"]
"""How the parts of a task join, see `evaluation.aggregate_spearman`."""

_SICK_FILES = {"train": "train", "dev": "trial", "test": "test_annotated"}


@dataclass(frozen=True)
class SentencePairs:
    """n sentence pairs with human similarity judgements.

    gold: (n,) float64, higher is more similar; maximum: the top of that scale; subsets: the part of
    the task each pair comes from."""

    name: str
    left: list[str]
    right: list[str]
    gold: np.ndarray
    maximum: float
    subsets: list[str]

    def __len__(self) -> int:
        return len(self.gold)


def load_lee() -> SentencePairs:
    """Lee's 50 short news documents: all 1,225 pairs with their human similarity, from gensim.

    Judgements are means over readers on a 5-point scale, divided by 5 (Lee, Pincombe & Welsh
    2005)."""
    documents = assets.LEE_DOCUMENTS.locate().read_text(encoding="latin-1").splitlines()
    first, second = np.triu_indices(len(documents), k=1)
    left, right = [documents[i] for i in first], [documents[j] for j in second]
    gold = np.loadtxt(assets.LEE_JUDGEMENTS.locate())[first, second]
    return SentencePairs("Lee", left, right, gold, 1.0, ["Lee"] * len(gold))


def senteval_folder(folder: str | Path | None = None) -> Path | None:
    """The folder that holds STS/ and SICK/: from the argument, else `FCSE_SENTEVAL`, else None.

    Either the folder itself or a parent with it under `downstream/` is taken; anything else is an
    `InputError`."""
    named = folder or os.environ.get("FCSE_SENTEVAL")
    if not named:
        return None
    for candidate in (Path(named) / "downstream", Path(named)):
        if (candidate / "STS").is_dir():
            return candidate
    raise InputError(f"{named} is no SentEval folder: expected {Path(named) / 'downstream/STS'}")


def load_sts(task: str, split: str = "test", folder: str | Path | None = None) -> SentencePairs:
    """One STS task as SentEval reads it: no pair without a gold score, words joined by spaces.

    task: one of `STS_TASKS`. split: STSBenchmark and SICKRelatedness also have "train" and "dev".
    folder: a SentEval data folder; else `FCSE_SENTEVAL`; else `senteval.tar` from the hub.

    InputError: unknown task or split, or a file that is missing or malformed."""
    if task not in STS_TASKS:
        raise InputError(f"unknown task {task!r}: choose from {', '.join(STS_TASKS)}")
    if task in STS_SUBSETS and split != "test":
        raise InputError(f"{task} has a test split only, not {split!r}")
    if split not in _SICK_FILES:
        raise InputError(f"unknown split {split!r} of {task}: choose from train, dev, test")
    root = senteval_folder(folder) or _senteval_from_hub()
    if task in STS_SUBSETS:
        rows = list(_read_yearly(root / "STS" / f"{task}-en-test", STS_SUBSETS[task]))
    elif task == "STSBenchmark":
        rows = list(_read_table(root / f"STS/{task}/sts-{split}.csv", task, (5, 6, 4), skip=0))
    else:
        file = f"SICK/SICK_{_SICK_FILES[split]}.txt"
        rows = list(_read_table(root / file, task, (1, 2, 3), skip=1))
    if not rows:
        raise InputError(f"{root} has no scored pair of {task}")
    left, right, gold, subsets = map(list, zip(*rows, strict=True))
    return SentencePairs(task, left, right, np.array(gold), 5.0, subsets)


def _senteval_from_hub() -> Path:
    way_out = "name a SentEval folder with --senteval or FCSE_SENTEVAL"
    try:
        archive = download("senteval.tar")
    except InputError as error:
        raise InputError(f"no STS data: {way_out} ({error})") from None
    cache = cache_folder()
    target = cache / f"senteval-{sha256(archive)[:12]}"
    if not target.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as partial, tarfile.open(archive) as tar:
                tar.extractall(Path(partial) / "data", filter="data")
                (Path(partial) / "data").rename(target)
        except (tarfile.TarError, EOFError) as error:
            said = f"{archive} cannot be unpacked ({first_line(error)})"
            raise InputError(f"{said}: {way_out}") from None
        except OSError as error:
            if not target.is_dir():  # else another process was faster
                raise InputError(f"{cache} cannot be written: {error.strerror}") from None
    found = next(target.rglob("downstream"), None)
    if found is None:
        raise InputError(f"{archive} holds no downstream/ folder: it is no SentEval data")
    return found


def _read_senteval_lines(path: Path) -> list[str]:
    if not is_file(path):
        raise InputError(f"{path} is missing: the SentEval folder is not complete")
    try:
        # splitlines() and not split("\n"): as SentEval reads these files.
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8: fetch the SentEval data again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


_Row = tuple[str, str, float, str]
"""Both sentences, the gold score, and the part of the task."""


def _row(left: str, right: str, gold: str, subset: str, place: str) -> _Row:
    score = math.nan
    with suppress(ValueError):
        score = float(gold)
    if not math.isfinite(score):
        raise InputError(f"{place}: the score {gold!r} is no number")
    return " ".join(left.split()), " ".join(right.split()), score, subset


def _read_yearly(folder: Path, subsets: Sequence[str]) -> Iterator[_Row]:
    for subset in subsets:
        pairs_path, gold_path = (folder / f"STS.{kind}.{subset}.txt" for kind in ("input", "gs"))
        pairs, scores = _read_senteval_lines(pairs_path), _read_senteval_lines(gold_path)
        if len(pairs) != len(scores):
            raise InputError(
                f"{gold_path} has {len(scores)} lines, but {pairs_path.name} has {len(pairs)}"
            )
        for number, (pair, score) in enumerate(zip(pairs, scores, strict=True), start=1):
            if score == "":
                continue
            left, tab, rest = pair.partition("\t")
            if not tab:
                raise InputError(f"{pairs_path}, line {number}: expected two sentences and a tab")
            yield _row(left, rest.split("\t")[0], score, subset, f"{gold_path}, line {number}")


def _read_table(path: Path, task: str, columns: Sequence[int], skip: int) -> Iterator[_Row]:
    for number, line in enumerate(_read_senteval_lines(path)[skip:], start=skip + 1):
        cells = line.strip().split("\t")
        if len(cells) <= max(columns):
            raise InputError(f"{path}, line {number}: expected {max(columns) + 1} columns")
        yield _row(*(cells[c] for c in columns), task, f"{path}, line {number}")
