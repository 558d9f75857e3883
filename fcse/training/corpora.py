"""Corpora larger than memory: tokenised once into a memory-mapped file, drawn in random batches."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from filelock import FileLock
from tqdm.auto import tqdm

from fcse import processes
from fcse.data import cache_folder, corpus_reader
from fcse.encoder.sentence_encoder import SentenceEncoder
from fcse.errors import InputError, replacing, writing

if TYPE_CHECKING:
    from datasets import Dataset

_CHUNK_SENTENCES, _CHUNK_CHARACTERS = 2_000, 2**20
"""What is tokenised at a time, and becomes one record batch of the file."""

_CHUNK_ROWS = 8192
"""Sentences that are embedded at a time."""

LONGEST = 10_000_000
"""Characters of the longest sentence taken: tokenisers need some 150 bytes for each of them."""


@dataclass(frozen=True)
class TokenizedCorpus:
    """A corpus with its token ids, both in a memory-mapped Arrow file.

    Memory does not grow with the corpus: what is drawn is read from the file, and the operating
    system lets go of it when it needs the room. About a byte of index a row stays in memory.

    dataset: a row each sentence, columns `sentence` (large_string) and `token_ids` (list<int32>).
    sha256: hash of the sentences, as `data.text_hash` gives it. key: that of all that decides the
    token ids too."""

    dataset: "Dataset"
    sha256: str
    key: str

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        encoder: SentenceEncoder,
        max_length: int,
        cache: str | Path | None = None,
        least: int = 1,
    ) -> Self:
        """Tokenise a corpus, or open what an earlier call made of the same sentences.

        The corpus is read once to hash it, and once more where it is tokenised. The file is named
        by all that decides its content; processes that want it at once wait for the first one.

        name_or_path: a corpus as `data.corpus_reader` takes it. encoder: whose tokenizer is used.
        max_length: tokens kept of each sentence. cache: folder of the file; `data.cache_folder` by
        default. least: sentences the corpus must have: one batch.

        InputError: no such corpus, not UTF-8, empty, fewer sentences than `least`, one longer than
        `LONGEST`, or a cache folder that cannot be written or is full."""
        read = corpus_reader(name_or_path)
        digest = hashlib.sha256()
        rows = sum(map(len, _chunks(read(), digest)))
        if rows < least:
            raise InputError(
                f"corpus {name_or_path!r} has {rows} sentences, fewer than one batch of {least}: "
                "lower batch_size or give more text"
            )
        sha256 = digest.hexdigest()
        cache = Path(cache or cache_folder())
        key = _key(sha256, encoder, max_length)
        path = cache / f"tokens-{key}.arrow"
        if (dataset := _open(path, rows)) is None:
            with writing(cache, "name another folder with XDG_CACHE_HOME, or make room"):
                cache.mkdir(parents=True, exist_ok=True)
                with FileLock(f"{path}.lock"):
                    if _open(path, rows) is None:  # else another process was faster
                        _build(path, read, sha256, rows, encoder, max_length)
            dataset = _open(path, rows)
        if dataset is None:
            raise InputError(f"{path} cannot be read back: name another folder with XDG_CACHE_HOME")
        return cls(dataset, sha256, key)

    def __len__(self) -> int:
        return len(self.dataset)

    def ids(self) -> np.ndarray:
        """(n,) int64, one each: equal where token ids are."""
        return np.concatenate([token_hashes(self.batch(rows)[1]) for rows in self._chunks()])

    def embed(self, encoder: SentenceEncoder) -> np.ndarray:
        """Unit-length embeddings of the whole corpus, (n, D) float16, the same in all processes."""
        embeddings = np.empty((len(self), encoder.dimension), dtype=np.float16)
        for rows in self._chunks():
            embeddings[rows] = processes.encode(encoder, self.batch(rows)[0])
        return embeddings

    def _chunks(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self), _CHUNK_ROWS):
            yield np.arange(start, min(start + _CHUNK_ROWS, len(self)))

    def batch(self, rows: np.ndarray) -> tuple[list[str], list[list[int]]]:
        """The sentences and the token ids of some rows, (B,) integers in any order."""
        batch = self.dataset[rows.tolist()]
        return batch["sentence"], batch["token_ids"]


def token_hashes(token_ids: Sequence[Sequence[int]]) -> np.ndarray:
    """A number for each sentence, (n,) int64: equal where the encoder cannot tell them apart."""
    digests = (hashlib.blake2b(np.asarray(ids, np.int32), digest_size=8) for ids in token_ids)
    return np.array([int.from_bytes(d.digest(), "little", signed=True) for d in digests], np.int64)


def row_batches(
    rows: int, batch_size: int, steps: int, seed: int, start: int = 0
) -> Iterator[np.ndarray]:
    """Which rows of a corpus each step draws: shuffled anew for every pass over the corpus.

    Yields (batch_size,) uint32 for the steps from `start` on, counted from 0, up to `steps`. Rows
    that are left at the end of a pass, fewer than a batch, are dropped. Step s draws the same rows
    whatever `steps` and `start` are. Takes 4 bytes of memory a row (of fewer than 2**32), 8 where a
    pass begins. InputError: fewer rows than a batch."""
    a_pass = rows // batch_size
    if not a_pass:
        raise InputError(f"{rows} sentences are fewer than one batch of {batch_size}")
    generator = np.random.default_rng(seed)
    shuffled = 0
    for step in range(start, steps):
        while shuffled <= step // a_pass:
            order = np.arange(rows, dtype=np.uint32)
            generator.shuffle(order)
            shuffled += 1
        first = step % a_pass * batch_size
        yield order[first : first + batch_size]


def _chunks(sentences: Iterable[str], digest: "hashlib._Hash") -> Iterator[list[str]]:
    """Lists of bounded size; the digest takes in what passes, as `data.text_hash` does."""
    chunk: list[str] = []
    characters = 0
    for sentence in sentences:
        if len(sentence) > LONGEST:
            raise InputError(
                f"the sentence that begins {sentence[:40]!r} has {len(sentence):,} characters, "
                f"more than {LONGEST:,}: put one sentence on each line"
            )
        digest.update(sentence.encode() + b"\n")
        chunk.append(sentence)
        characters += len(sentence)
        if len(chunk) == _CHUNK_SENTENCES or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _key(sha256: str, encoder: SentenceEncoder, max_length: int) -> str:
    """What a tokenised corpus is known by: everything that decides its token ids."""
    decides = {
        "sentences": sha256,
        "tokenizer": _tokenizer_hash(encoder, max_length),
        "max_length": min(max_length, encoder.max_length),
        "versions": {name: version(name) for name in ("fcse", "transformers", "tokenizers")},
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]


def _tokenizer_hash(encoder: SentenceEncoder, max_length: int) -> str:
    """Hash of what a tokenizer consists of, wherever it lies."""
    tokenizer = encoder.tokenizer
    kind = f"{type(tokenizer).__name__} {tokenizer.split_special_tokens}\n"
    digest = hashlib.sha256(kind.encode())
    if tokenizer.is_fast:
        # It also tells how its last call cut: this call makes that the same each time.
        encoder.tokenize([""], max_length)
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
        return digest.hexdigest()
    try:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
                digest.update(file.name.encode() + b"\n" + file.read_bytes())
    except OSError as error:
        raise InputError(
            f"the tokenizer cannot be written to a temporary folder ({error.strerror}): make "
            "room, or name another with TMPDIR"
        ) from None
    return digest.hexdigest()


def _open(path: Path, rows: int) -> "Dataset | None":
    """The file as a dataset, or None where it is missing or not whole."""
    import pyarrow
    from datasets import Dataset

    try:
        dataset = Dataset.from_file(str(path))
    except (OSError, pyarrow.ArrowInvalid):
        return None
    return dataset if len(dataset) == rows else None


def _build(
    path: Path,
    read: Callable[[], Iterator[str]],
    sha256: str,
    rows: int,
    encoder: SentenceEncoder,
    max_length: int,
) -> None:
    import pyarrow as pa

    schema = pa.schema({"sentence": pa.large_string(), "token_ids": pa.list_(pa.int32())})
    digest = hashlib.sha256()
    bar = tqdm(total=rows, desc="tokenizing", unit=" sentences", delay=2, leave=False)
    with replacing(path) as partial:
        with bar, partial.open("wb") as file, pa.ipc.new_stream(file, schema) as stream:
            for chunk in _chunks(read(), digest):
                columns = {"sentence": chunk, "token_ids": encoder.tokenize(chunk, max_length)}
                stream.write(pa.record_batch(columns, schema))
                bar.update(len(chunk))
        if digest.hexdigest() != sha256:
            raise InputError("the corpus changed while it was tokenised: run the command again")
