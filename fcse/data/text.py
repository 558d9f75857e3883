"""Corpora by name: packaged with a dependency, a local path, or the hub."""

import bz2
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from fcse.data.assets import (
    WIKI_MINI,
    cache_folder,
    download,
    hub_reachable,
    is_file,
    is_folder,
    sha256,
)
from fcse.errors import InputError, first_line, replacing

if TYPE_CHECKING:
    from datasets import Dataset


def text_hash(lines: Iterable[str]) -> str:
    """Hexadecimal SHA-256 of the lines, each followed by a newline, in UTF-8."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


# A stop (with its closing quote or bracket), then space, then a capital: initials such as "G."
# do not count, since they follow a capital.
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]\"'][.!?])[\"')]*\s+(?=[\"'(]?[A-Z])")
# Brackets lose what stood in them to markup that is not read: pronunciations, other scripts.
_IN_BRACKETS = re.compile(r"(?<=\()[\s,;:]+|[\s,;:]+(?=\))")
_EMPTY_BRACKETS = re.compile(r"\s*\(['’.]?\)")
# A word is gone where punctuation stands alone, and a table or file name is no prose.
_LEFTOVER = re.compile(r"[|{}]|\s[,;.](?!\.)|[,;][,;.]|\b(?:and|or|of|as)\)|\((?:m|ft|km)\)|File:")


@lru_cache(maxsize=1)
def load_wiki_articles() -> dict[str, list[str]]:
    """The slice of English Wikipedia that gensim carries: article title -> its sentences.

    106 articles, 18,836 distinct sentences of 4 to 60 words, in the order of the dump; a sentence
    that occurs in two articles belongs to the first. Reading markup takes seconds: what it gives is
    kept in `data.cache_folder` where that can be written."""
    dump = WIKI_MINI.locate()
    decides = (WIKI_MINI.sha256, version("gensim"), sha256(Path(__file__)))
    path = cache_folder() / f"wiki-mini-{text_hash(decides)[:32]}.json"
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    articles = _read_wikipedia(dump)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            new.write_text(json.dumps(articles))
    return articles


def _read_wikipedia(path: Path) -> dict[str, list[str]]:
    from gensim.corpora import wikicorpus

    seen: set[str] = set()
    articles: dict[str, list[str]] = {}
    with bz2.open(path) as dump:
        pages = list(wikicorpus.extract_pages(dump, filter_namespaces=("0",)))
    for title, markup, _ in tqdm(pages, desc="reading Wikipedia", delay=2, leave=False):
        if markup.lstrip().lower().startswith("#redirect"):
            continue
        for line in wikicorpus.filter_wiki(markup).split("\n"):
            paragraph = " ".join(line.replace("'''", "").replace("''", "").split())
            if not paragraph or paragraph[0] in "*#:;=|!{}<>":
                continue  # a list item, table row or heading
            for sentence in _SENTENCE_END.split(paragraph):
                sentence = _EMPTY_BRACKETS.sub("", _IN_BRACKETS.sub("", sentence))
                prose = 4 <= len(sentence.split()) <= 60 and not _LEFTOVER.search(sentence)
                if prose and sentence not in seen:
                    seen.add(sentence)
                    articles.setdefault(title, []).append(sentence)
    return articles


def article_batch(
    articles: Mapping[str, Sequence[str]], size: int = 64, each: int = 4
) -> tuple[list[str], list[str]]:
    """A batch in which articles repeat, and the title of each sentence's article.

    The first `each` sentences of articles from all over a corpus, `size` in all, a multiple of
    `each`; an `InputError` where too few articles have that many."""
    titles = [title for title, sentences in articles.items() if len(sentences) >= each]
    wanted = size // each
    if len(titles) < wanted:
        raise InputError(f"{wanted} articles of {each} sentences are needed, got {len(titles)}")
    titles = titles[:: len(titles) // wanted][:wanted]
    sentences = [sentence for title in titles for sentence in articles[title][:each]]
    return sentences, [title for title in titles for _ in range(each)]


def spread(sentences: Sequence[str], size: int) -> list[str]:
    """`size` sentences from all over a corpus, evenly spaced, the first one among them."""
    return list(sentences[:: len(sentences) // size][:size])


def load_corpus(name_or_path: str | Path, limit: int | None = None) -> list[str]:
    """What `corpus_reader` reads as a list, no further than the first `limit` sentences, >= 1."""
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
            "DATASET:COLUMN" for text of a Hugging Face dataset: a hub name (its train split) or a
            folder written by `save_to_disk`.

    InputError: no such corpus; while reading: not UTF-8, not text, or no sentence at all."""
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
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                # Not splitlines(): that also breaks at form feeds and Unicode separators.
                yield from text.split("\r")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 (line {number}): convert it with iconv") from None
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
    columns = dataset.column_names
    if column not in columns:
        raise InputError(f"dataset {name!r} has no column {column!r}: it has {', '.join(columns)}")
    return dataset.select_columns(column)


def _read_column(dataset: "Dataset", name: str, column: str) -> Iterator[str]:
    for rows in dataset.iter(batch_size=1000):
        for value in rows[column]:
            if not isinstance(value, str):
                raise InputError(f"column {column!r} of dataset {name!r} is not text")
            yield value
