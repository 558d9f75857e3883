"""Tokenised corpora: the same as a list in memory, whatever the text and whatever goes wrong."""

import os
import resource
import signal
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import datasets
import numpy as np
import pyarrow as pa
import pytest
from conftest import bert_config, make_tokenizer, one_line_refusal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from own_process import CLEAN
from transformers import AutoModel, ByT5Tokenizer

from fcse.data import cache_folder, load_corpus, text_hash
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError
from fcse.training import corpora
from fcse.training.corpora import LONGEST, TokenizedCorpus, row_batches

EXAMPLES = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def encoder(tiny_model):
    return SentenceEncoder.from_pretrained(tiny_model("bert"))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def files(cache):
    """What a cache folder holds, but for locks."""
    return sorted(p for p in cache.glob("*") if p.suffix != ".lock") if cache.exists() else []


@contextmanager
def tokenized(encoder):
    """The sentences that are tokenised within, call by call."""
    calls, plain = [], encoder.tokenize

    def tokenize(sentences, max_length=None):
        if sentences != [""]:
            calls.append(list(sentences))
        return plain(sentences, max_length)

    encoder.tokenize = tokenize
    try:
        yield calls
    finally:
        del encoder.tokenize


def check_equals_list(name, encoder, cache, max_length=12):
    """The file holds what `load_corpus` and `tokenize` give, and a random order of it too."""
    sentences = load_corpus(name)
    corpus = TokenizedCorpus.load(name, encoder, max_length, cache)
    assert len(corpus) == len(sentences)
    assert corpus.sha256 == text_hash(sentences)
    token_ids = encoder.tokenize(sentences, max_length)
    for rows in (np.arange(len(corpus)), np.random.default_rng(0).permutation(len(corpus))):
        drawn = corpus.batch(rows)
        assert drawn == ([sentences[i] for i in rows], [token_ids[i] for i in rows])
    return corpus


def as_before(path):
    """The sentences of a text file, read at once: how it was done while all was held in memory."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [s for s in map(str.strip, lines) if s]


LINE_PARTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(["\n", "\r", "\r\n", "\f", "\x00", "\u2028", "\u200f", "\ufeff", " ", "\x85"]),
    st.sampled_from(["A sentence.", "שלום עולם", "مرحبا بالعالم", "日本語", "e\u0301", "👩‍👩‍👧"]),
)


@EXAMPLES
@given(parts=st.lists(LINE_PARTS, max_size=30), chunk=st.integers(1, 5))
def test_any_text_gives_what_a_list_gives(parts, chunk, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    path = write(folder / "text.txt", "".join(parts))
    expected = as_before(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "_CHUNK_SENTENCES", chunk)
        if expected:
            assert load_corpus(path) == expected
            check_equals_list(path, encoder, folder / "cache")
        else:
            with one_line_refusal("has no sentences: put one on each line"):
                TokenizedCorpus.load(path, encoder, 12, folder / "cache")
            assert not files(folder / "cache")


@EXAMPLES
@given(
    content=st.lists(st.one_of(st.binary(max_size=8), st.just(b"\n")), max_size=20).map(b"".join)
)
def test_any_bytes_give_what_a_list_gives_or_one_line(content, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    path = write(folder / "text.txt", content)
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        with one_line_refusal(rf"text\.txt is not UTF-8 \(line {line}\)"):
            TokenizedCorpus.load(path, encoder, 12, folder / "cache")
        assert not files(folder / "cache")
    else:
        if as_before(path):
            check_equals_list(path, encoder, folder / "cache")


def test_an_enormous_line_is_taken(encoder, tmp_path, cache):
    path = write(tmp_path / "long.txt", "Short.\n" + "many words " * 20_000 + "\nShort again.\n")
    check_equals_list(path, encoder, cache)


def test_a_line_beyond_the_longest_is_refused(encoder, tmp_path, cache):
    path = write(tmp_path / "longer.txt", "Short.\n" + "x" * (LONGEST + 1))
    with one_line_refusal(
        "begins 'xxxx.* has 10,000,001 characters, more than 10,000,000: put one"
    ):
        TokenizedCorpus.load(path, encoder, 12, cache)
    assert not files(cache)


def test_long_lines_are_tokenised_few_at_a_time(encoder, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(corpora, "_CHUNK_CHARACTERS", 100)
    lines = [c * 60 for c in "abcdefg"]
    path = write(tmp_path / "lines.txt", "\n".join(lines))
    with tokenized(encoder) as calls:
        TokenizedCorpus.load(path, encoder, 12, cache)
    assert calls == [lines[0:2], lines[2:4], lines[4:6], lines[6:]]


def test_duplicates_are_kept(encoder, tmp_path, cache):
    path = write(tmp_path / "same.txt", "The same.\n" * 30_000 + "Another.\n")
    corpus = TokenizedCorpus.load(path, encoder, 12, cache)
    assert len(corpus) == 30_001
    sentences, token_ids = corpus.batch(np.array([0, 29_999, 30_000, 1]))
    assert sentences == ["The same.", "The same.", "Another.", "The same."]
    assert token_ids == encoder.tokenize(sentences, 12)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"plain\ncaf\xc3\xa9\ncaf\xe9\n", r"text\.txt is not UTF-8 \(line 3\)"),
        ("plain\n".encode("utf-16"), r"text\.txt is not UTF-8 \(line 1\)"),
        (b" \r\n\n\t", r"text\.txt' has no sentences"),
    ],
)
def test_text_that_is_refused_leaves_nothing(content, match, encoder, tmp_path, cache):
    path = write(tmp_path / "text.txt", content)
    for refused in (load_corpus, lambda name: TokenizedCorpus.load(name, encoder, 12, cache)):
        with one_line_refusal(match):
            refused(path)
    assert not files(cache)


def test_what_is_no_corpus_is_refused_alike(encoder, tmp_path, cache):
    for name in (tmp_path, tmp_path / "none.txt", f"{tmp_path}/none:text"):
        messages = []
        for refused in (load_corpus, lambda name: TokenizedCorpus.load(name, encoder, 12, cache)):
            with pytest.raises(InputError) as refusal:
                refused(name)
            messages.append(str(refusal.value))
        assert messages[0] == messages[1]
    assert not files(cache)


def test_packaged_corpus(encoder, cache):
    whole = load_corpus("wiki-mini")
    corpus = TokenizedCorpus.load("wiki-mini", encoder, 32, cache)
    assert (len(corpus), corpus.sha256) == (len(whole), text_hash(whole))
    rows = np.random.default_rng(0).integers(0, len(whole), 64)
    sentences = [whole[i] for i in rows]
    assert corpus.batch(rows) == (sentences, encoder.tokenize(sentences, 32))


def test_dataset_column(encoder, tmp_path, cache):
    dataset = datasets.Dataset.from_dict({"text": ["One. ", " ", "Two."], "label": [1, 2, 3]})
    dataset.save_to_disk(tmp_path / "saved")
    corpus = check_equals_list(f"{tmp_path / 'saved'}:text", encoder, cache)
    assert corpus.batch(np.array([1, 0]))[0] == ["Two.", "One."]
    with one_line_refusal(r"column 'label' .* is not text"):
        TokenizedCorpus.load(f"{tmp_path / 'saved'}:label", encoder, 12, cache)


def test_limit_reads_no_further(tmp_path):
    path = write(tmp_path / "text.txt", b"One.\n\nTwo.\ncaf\xe9\n")
    assert load_corpus(path, limit=2) == ["One.", "Two."]
    table = {"text": [" ", "One.", None]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "saved")
    assert load_corpus(f"{tmp_path / 'saved'}:text", limit=1) == ["One."]


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
def test_tokenizers_of_each_kind(architecture, tiny_model, small_corpus, cache):
    encoder = SentenceEncoder.from_pretrained(tiny_model(architecture))
    check_equals_list(small_corpus, encoder, cache, max_length=32)


def test_a_file_that_cannot_be_mapped_is_named(encoder, small_corpus, cache, monkeypatch):
    monkeypatch.setattr(corpora, "_open", lambda path, rows: None)
    with one_line_refusal(r"\.arrow cannot be read back: name another folder"):
        TokenizedCorpus.load(small_corpus, encoder, 12, cache)


@pytest.fixture
def slow_encoder():
    """A tiny encoder with a tokenizer that has no fast half."""
    tokenizer = ByT5Tokenizer()
    return SentenceEncoder(AutoModel.from_config(bert_config(len(tokenizer))), tokenizer, "cls")


def test_tokenizer_without_a_fast_half(slow_encoder, small_corpus, cache):
    check_equals_list(small_corpus, slow_encoder, cache, max_length=32)
    with tokenized(slow_encoder) as calls:
        TokenizedCorpus.load(small_corpus, slow_encoder, 32, cache)
    assert not calls
    slow_encoder.tokenizer.split_special_tokens = True
    check_equals_list(small_corpus, slow_encoder, cache, max_length=32)
    assert len(files(cache)) == 2


def test_tokenizer_that_cannot_be_saved_is_named(slow_encoder, small_corpus, cache, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    with one_line_refusal(r"temporary folder \(No such file or directory\): make room, or name"):
        TokenizedCorpus.load(small_corpus, slow_encoder, 32, cache)


def test_second_call_tokenises_nothing(encoder, tiny_model, small_corpus, tmp_path, cache):
    TokenizedCorpus.load(small_corpus, encoder, 12, cache)
    (path,) = files(cache)
    before = path.stat()
    # Neither what else was tokenised, nor the folders of text and tokenizer, nor weights count.
    encoder.tokenize(["Another length."], 5)
    encoder.tokenizer.pad({"input_ids": [[1], [1, 2]]})
    encoder.save_pretrained(tmp_path / "moved")
    moved = SentenceEncoder.from_pretrained(tmp_path / "moved", seed=7)
    copy = write(tmp_path / "copy.txt", "\n".join(load_corpus(small_corpus)) + "\r\n\n")
    for again, text in ((encoder, small_corpus), (moved, small_corpus), (moved, copy)):
        with tokenized(again) as calls:
            check = TokenizedCorpus.load(text, again, 12, cache)
        assert not calls
        assert len(check) == 40
    assert files(cache) == [path]
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_other_text_tokenizer_or_length_is_another_file(
    encoder, sentences, small_corpus, tmp_path, cache
):
    check_equals_list(small_corpus, encoder, cache)
    check_equals_list(small_corpus, encoder, cache, max_length=13)
    other_text = write(tmp_path / "other.txt", "\n".join(sentences[:39]))
    check_equals_list(other_text, encoder, cache)
    encoder.tokenizer = make_tokenizer([s.lower() for s in sentences[200:]])
    check_equals_list(small_corpus, encoder, cache)
    encoder.tokenizer.truncation_side = "left"
    check_equals_list(small_corpus, encoder, cache)
    assert len(files(cache)) == 5


def test_length_beyond_the_backbones_is_the_backbones(encoder, small_corpus, cache):
    for max_length in (encoder.max_length, encoder.max_length + 1, 10_000):
        check_equals_list(small_corpus, encoder, cache, max_length)
    assert len(files(cache)) == 1


def test_the_users_cache_is_the_default(encoder, small_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    TokenizedCorpus.load(small_corpus, encoder, 12)
    assert len(files(tmp_path / "xdg" / "fcse")) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "fcse"


@pytest.mark.parametrize("kept", [0, 0.3, 0.5, 0.9, 0.999])
def test_a_file_cut_short_is_made_again(kept, encoder, small_corpus, cache, monkeypatch):
    monkeypatch.setattr(corpora, "_CHUNK_SENTENCES", 3)
    check_equals_list(small_corpus, encoder, cache)
    (path,) = files(cache)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    check_equals_list(small_corpus, encoder, cache)


def test_a_file_cut_between_two_parts_is_made_again(encoder, small_corpus, cache, monkeypatch):
    monkeypatch.setattr(corpora, "_CHUNK_SENTENCES", 3)
    corpus = check_equals_list(small_corpus, encoder, cache)
    (path,) = files(cache)
    table = corpus.dataset.data.table.slice(0, 6)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    check_equals_list(small_corpus, encoder, cache)


def killed_while_tokenising(name, encoder, cache):
    plain = encoder.tokenize

    def tokenize(sentences, max_length=None):
        if "killed" in sentences[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(sentences, max_length)

    encoder.tokenize = tokenize
    corpora._CHUNK_SENTENCES = 3
    TokenizedCorpus.load(name, encoder, 12, cache)


def test_a_killed_build_is_not_taken_for_whole(encoder, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(corpora, "_CHUNK_SENTENCES", 3)
    path = write(tmp_path / "text.txt", "A line.\n" * 9 + "here it is killed\n" + "A line.\n" * 9)
    process = CLEAN.Process(target=killed_while_tokenising, args=(path, encoder, cache))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (left,) = files(cache)
    assert left.suffix == ".partial"
    check_equals_list(path, encoder, cache)
    (left,) = files(cache)
    assert left.suffix == ".arrow"


def test_an_interrupted_build_leaves_nothing(encoder, small_corpus, cache, monkeypatch):
    def interrupted(sentences, max_length=None):
        if sentences != [""]:
            raise KeyboardInterrupt
        return [[]]

    monkeypatch.setattr(encoder, "tokenize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TokenizedCorpus.load(small_corpus, encoder, 12, cache)
    assert not files(cache)


def test_a_corpus_that_changes_meanwhile_is_refused(encoder, cache, monkeypatch):
    texts = iter([["One.", "Two."], ["One.", "Three."]])
    monkeypatch.setattr(corpora, "corpus_reader", lambda name: lambda: iter(next(texts)))
    with one_line_refusal("changed while it was tokenised"):
        TokenizedCorpus.load("changing", encoder, 12, cache)
    assert not files(cache)


def test_two_at_once_tokenise_once(tiny_model, sentences, tmp_path, cache):
    path = write(tmp_path / "text.txt", "\n".join(sentences))
    encoders = [SentenceEncoder.from_pretrained(tiny_model("bert")) for _ in range(3)]
    with tokenized(encoders[0]) as a, tokenized(encoders[1]) as b, tokenized(encoders[2]) as c:
        with ThreadPoolExecutor(3) as pool:
            made = list(pool.map(lambda e: TokenizedCorpus.load(path, e, 12, cache), encoders))
        assert len(a) + len(b) + len(c) == 1
    assert len({corpus.batch(np.arange(9))[0][8] for corpus in made}) == 1


def test_cache_that_cannot_be_made_is_named(encoder, small_corpus, tmp_path):
    blocked = write(tmp_path / "file", "in the way") / "cache"
    with one_line_refusal(rf"{blocked} cannot be written \(Not a directory\): name another folder"):
        TokenizedCorpus.load(small_corpus, encoder, 12, blocked)


def test_read_only_cache_is_named_but_still_read(encoder, sentences, small_corpus, tmp_path, cache):
    check_equals_list(small_corpus, encoder, cache)
    cache.chmod(0o555)
    if os.access(cache, os.W_OK):
        pytest.skip("this user may write anywhere")
    check_equals_list(small_corpus, encoder, cache)
    other = write(tmp_path / "other.txt", sentences[0])
    with one_line_refusal(r"cannot be written \(Permission denied\)"):
        TokenizedCorpus.load(other, encoder, 12, cache)


def test_full_cache_is_named_and_left_clean(encoder, sentences, tmp_path, cache):
    path = write(tmp_path / "text.txt", "\n".join(sentences * 20))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with one_line_refusal(r"cannot be written \(File too large\): .* or make room"):
            TokenizedCorpus.load(path, encoder, 12, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not files(cache)
    assert len(TokenizedCorpus.load(path, encoder, 12, cache)) == 8000


def batches_of_a_list(rows, batch_size, steps, seed):
    """Today's order of the sentences, as a run has drawn them from a list in memory."""
    order = np.random.default_rng(seed)
    left = []
    for _ in range(steps):
        if len(left) < batch_size:
            left = order.permutation(rows).tolist()
        batch, left = left[:batch_size], left[batch_size:]
        yield batch


@given(
    batch_size=st.integers(1, 9),
    more=st.integers(0, 60),
    steps=st.integers(0, 40),
    start=st.integers(0, 40),
    seed=st.integers(0, 2**32 - 1),
)
@settings(deadline=None)
def test_rows_are_those_of_a_list_from_any_step(batch_size, more, steps, start, seed):
    rows = batch_size + more
    expected = list(batches_of_a_list(rows, batch_size, steps, seed))
    drawn = list(row_batches(rows, batch_size, steps, seed, start))
    assert [batch.tolist() for batch in drawn] == expected[start:]


def test_rows_of_a_large_corpus_are_those_of_a_list():
    expected = list(batches_of_a_list(1_000_003, 64, 20, 3))
    drawn = list(row_batches(1_000_003, 64, 20, 3))
    assert [batch.tolist() for batch in drawn] == expected
    assert {(batch.dtype, batch.shape) for batch in drawn} == {(np.dtype(np.uint32), (64,))}


def test_rows_of_a_step_stay_as_they_were_drawn():
    drawn = list(row_batches(6, 3, 8, 0))
    for i in range(0, 8, 2):
        assert sorted([*drawn[i], *drawn[i + 1]]) == list(range(6))


def test_fewer_rows_than_a_batch_are_refused():
    with one_line_refusal("3 sentences are fewer than one batch of 4"):
        next(row_batches(3, 4, 1, 0))
