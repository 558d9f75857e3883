"""Corpora and judgements: packaged, in files of every shape a user has, and in the hub's cache."""

import json
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from huggingface_hub import constants

from fcse.data import (
    HUB_DATASET,
    LEE_DOCUMENTS,
    LEE_JUDGEMENTS,
    STS_SUBSETS,
    STS_TASKS,
    hub_reachable,
    load_corpus,
    load_lee,
    load_sts,
    load_wiki_articles,
    senteval_folder,
    sha256,
    spread,
    text_hash,
)
from fcse.errors import InputError

PAIRS = {
    "STS12": 3108,
    "STS13": 1500,
    "STS14": 3750,
    "STS15": 3000,
    "STS16": 1186,
    "STSBenchmark": 1379,
    "SICKRelatedness": 4927,
}
"""Pairs that the SentEval code scores for each task, on its test split."""


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_packaged_wikipedia():
    articles = load_wiki_articles()
    corpus = load_corpus("wiki-mini")
    assert len(articles) == 106
    assert corpus == [sentence for article in articles.values() for sentence in article]
    assert len(corpus) == 18_836
    assert len(set(corpus)) == len(corpus)
    assert {len(sentence.split()) for sentence in corpus} == set(range(4, 61))
    # Prose: no markup is left, and nine in ten end as sentences do; the rest are captions.
    markup = ("[[", "{", "}", "|", "'''", "\n", "  ", "File:")
    # Nor what it takes with it: words before a comma, and all that stood in brackets.
    lost = (" ,", " ;", ",,", ",;", "()", "( ", " )", "(,", "(;", ",)", ";)", " of)", " and)")
    assert not [s for s in corpus if any(x in s for x in markup + lost)]
    assert sum(s.rstrip("\"')]")[-1] in ".!?" for s in corpus) > 0.9 * len(corpus)


def test_wikipedia_is_read_once_and_again_where_that_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    articles = load_wiki_articles()
    read = load_wiki_articles.__wrapped__
    assert read() == articles
    (kept,) = (tmp_path / "fcse").iterdir()
    kept.write_text('{"A title": ["A sentence."]}')
    assert read() == {"A title": ["A sentence."]}
    kept.write_text('{"A title": ["A sen')
    assert read() == articles == json.loads(kept.read_text())
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # where nothing can be written
    assert read() == articles


@pytest.mark.parametrize("limit", [1, 7, 10_000_000])
def test_limit_keeps_the_first_sentences(limit):
    whole = load_corpus("wiki-mini")
    assert load_corpus("wiki-mini", limit) == whole[:limit]


@pytest.mark.parametrize(("size", "count"), [(1, 1), (5, 5), (5, 17), (64, 18_836)])
def test_a_spread_batch_is_evenly_spaced(size, count):
    batch = spread(range(count), size)
    gaps = np.diff(batch)
    assert (len(batch), batch[0]) == (size, 0)
    assert set(gaps) <= {count // size}
    assert count - 1 - batch[-1] < count // size + size


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_below_one_is_refused(limit):
    with pytest.raises(InputError, match="limit must be at least 1"):
        load_corpus("wiki-mini", limit)


def test_a_loaded_corpus_is_the_callers_own():
    load_corpus("wiki-mini").clear()
    assert load_corpus("wiki-mini")


def test_text_file(tmp_path):
    path = write(
        tmp_path / "corpus.txt",
        "\ufeffFirst sentence.\r\n\r\n  Second, with café and 日本.\t\r\n   \r\n"
        # A form feed and a Unicode separator are part of a line, not its end.
        "Third\fwith\u2028odd spaces.\r\n\r\nLast without a newline",
    )
    expected = [
        "First sentence.",
        "Second, with café and 日本.",
        "Third\fwith\u2028odd spaces.",
        "Last without a newline",
    ]
    assert load_corpus(str(path)) == expected
    assert load_corpus(path) == expected
    assert load_corpus(str(path), limit=2) == expected[:2]


def test_line_that_is_not_utf8_is_named(tmp_path):
    path = write(tmp_path / "latin.txt", b"plain\nalso plain\ncaf\xe9\nplain\n")
    with pytest.raises(InputError, match=r"latin\.txt is not UTF-8 \(line 3\)"):
        load_corpus(str(path))


@pytest.mark.parametrize("content", ["", "\n\n", " \r\n\t\n", "\ufeff"])
def test_empty_file_is_refused(content, tmp_path):
    path = write(tmp_path / "empty.txt", content)
    with pytest.raises(InputError, match=r"empty\.txt' has no sentences"):
        load_corpus(str(path))


def test_what_is_no_file_is_refused(tmp_path):
    for name in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError, match="is no file: give wiki-mini") as refusal:
            load_corpus(str(name))
        assert str(name) in str(refusal.value)


def test_saved_dataset(tmp_path):
    table = {"text": ["One sentence.", " ", "Another one. "], "label": [1, 2, 3]}
    dataset = datasets.Dataset.from_dict(table)
    dataset.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(train=dataset).save_to_disk(tmp_path / "split")
    datasets.DatasetDict(test=dataset).save_to_disk(tmp_path / "untrained")
    for name in ("plain", "split"):
        assert load_corpus(f"{tmp_path / name}:text") == ["One sentence.", "Another one."]
        assert load_corpus(f"{tmp_path / name}:text", limit=1) == ["One sentence."]
    with pytest.raises(InputError, match="no column 'body': it has text, label"):
        load_corpus(f"{tmp_path / 'plain'}:body")
    with pytest.raises(InputError, match=r"column 'label' .* is not text"):
        load_corpus(f"{tmp_path / 'plain'}:label")
    with pytest.raises(InputError, match="with a train split"):
        load_corpus(f"{tmp_path / 'untrained'}:text")


@pytest.mark.parametrize("name", ["nobody/no-such-dataset:text", "no-such-dataset:text"])
def test_dataset_that_is_nowhere_is_refused(name, no_sts_data):
    with pytest.raises(InputError, match="could not be loaded") as refusal:
        load_corpus(name)
    assert "\n" not in str(refusal.value)


def test_text_hash_depends_on_where_lines_end():
    assert text_hash(["a", "b"]) == text_hash(["a", "b"])
    assert len({text_hash(lines) for lines in (["a", "b"], ["ab"], ["b", "a"], ["a"], [])}) == 5


def test_lee():
    lee = load_lee()
    assert len(lee) == len(lee.left) == len(lee.right) == len(lee.subsets) == 50 * 49 // 2
    assert len({*lee.left, *lee.right}) == 50
    assert len({frozenset(pair) for pair in zip(lee.left, lee.right, strict=True)}) == len(lee)
    assert lee.gold.dtype == np.float64
    assert lee.gold.min() == pytest.approx(0.2)
    assert 0.9 < lee.gold.max() <= lee.maximum == 1.0
    # Each document is in 49 pairs, once with every other.
    assert set(Counter([*lee.left, *lee.right]).values()) == {49}


def test_lee_gold_stands_beside_its_own_pair():
    documents = LEE_DOCUMENTS.locate().read_text(encoding="latin-1").splitlines()
    matrix = np.loadtxt(LEE_JUDGEMENTS.locate())
    assert matrix.shape == (50, 50)
    # The file has each judgement once: were it the other triangle, all scores would be 0.
    np.testing.assert_array_equal(matrix, np.triu(matrix))
    np.testing.assert_array_equal(np.diag(matrix), 1)
    lee = load_lee()
    pairs = zip(lee.left, lee.right, lee.gold, strict=True)
    gold = [matrix[documents.index(left), documents.index(right)] for left, right, _ in pairs]
    np.testing.assert_array_equal(lee.gold, gold)


def write_yearly(root, task, lines):
    folder = root / "STS" / f"{task}-en-test"
    for subset in STS_SUBSETS[task]:
        pairs, gold = lines.get(subset, ("a b\tc d\n", "2.5\n"))
        write(folder / f"STS.input.{subset}.txt", pairs)
        write(folder / f"STS.gs.{subset}.txt", gold)


@pytest.fixture
def small_senteval(tmp_path, monkeypatch):
    """A SentEval folder of a few pairs, in the layout of the original."""
    root = tmp_path / "data" / "downstream"
    dirty = "A  man\t is   here .\n\tno left side\nthird \tpair\tand a third cell\n"
    write_yearly(root, "STS13", {"FNWN": ("x y\tz\nu\tv\n", "\n1.5\n")})
    write_yearly(root, "STS12", {"MSRvid": (dirty, "4.25\n0\n\n")})
    row = "genre\tfile\tyear\tid\t{}\tA plane  takes off.\tAn air plane .\n"
    for split, score in (("train", "1.0"), ("dev", "2.0"), ("test", "5.000")):
        write(root / f"STS/STSBenchmark/sts-{split}.csv", row.format(score))
    header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
    for file, score in (("SICK_train", 1.5), ("SICK_trial", 2.5), ("SICK_test_annotated", 3.5)):
        write(root / f"SICK/{file}.txt", f"{header}7\tA  dog\tA cat\t{score}\tNEUTRAL\n")
    monkeypatch.setenv("FCSE_SENTEVAL", str(tmp_path / "data"))
    return root


def test_yearly_task_drops_what_nobody_judged(small_senteval):
    pairs = load_sts("STS12")
    assert pairs.left == ["a b", "A man", "", "a b", "a b", "a b"]
    assert pairs.right == ["c d", "is here .", "no left side", "c d", "c d", "c d"]
    np.testing.assert_array_equal(pairs.gold, [2.5, 4.25, 0, 2.5, 2.5, 2.5])
    assert pairs.subsets == ["MSRpar", "MSRvid", "MSRvid", *STS_SUBSETS["STS12"][2:]]
    assert (pairs.name, pairs.maximum) == ("STS12", 5.0)
    first_of_13 = load_sts("STS13")
    assert (first_of_13.left[0], first_of_13.gold[0]) == ("u", 1.5)


@pytest.mark.parametrize(("split", "score"), [("train", 1.0), ("dev", 2.0), ("test", 5.0)])
def test_sts_benchmark_splits(split, score, small_senteval):
    pairs = load_sts("STSBenchmark", split)
    assert (pairs.left, pairs.right) == (["A plane takes off."], ["An air plane ."])
    assert pairs.gold.tolist() == [score]


@pytest.mark.parametrize(("split", "score"), [("train", 1.5), ("dev", 2.5), ("test", 3.5)])
def test_sick_splits(split, score, small_senteval):
    pairs = load_sts("SICKRelatedness", split)
    assert (pairs.left, pairs.right, pairs.gold.tolist()) == (["A dog"], ["A cat"], [score])


def test_folder_named_by_argument_environment_or_parent(small_senteval, monkeypatch):
    assert senteval_folder() == small_senteval
    assert senteval_folder(small_senteval) == small_senteval
    assert senteval_folder(str(small_senteval.parent)) == small_senteval
    monkeypatch.setenv("FCSE_SENTEVAL", str(small_senteval / "no" / "where"))
    assert load_sts("STS12", folder=small_senteval).name == "STS12"
    with pytest.raises(InputError, match="is no SentEval folder"):
        load_sts("STS12")
    monkeypatch.setenv("FCSE_SENTEVAL", "")
    assert senteval_folder() is None


def test_line_counts_that_differ_are_named(small_senteval):
    write_yearly(small_senteval, "STS12", {"MSRvid": ("a\tb\nc\td\n", "1\n2\n3\n")})
    match = r"STS\.gs\.MSRvid\.txt has 3 lines, but STS\.input\.MSRvid\.txt has 2"
    with pytest.raises(InputError, match=match):
        load_sts("STS12")


def test_missing_file_is_named(small_senteval):
    (small_senteval / "STS/STS12-en-test/STS.gs.MSRpar.txt").unlink()
    with pytest.raises(InputError, match=r"STS\.gs\.MSRpar\.txt is missing"):
        load_sts("STS12")
    (small_senteval / "SICK/SICK_trial.txt").unlink()
    with pytest.raises(InputError, match=r"SICK_trial\.txt is missing"):
        load_sts("SICKRelatedness", "dev")


@pytest.mark.parametrize(
    ("pairs", "gold", "match"),
    [
        ("a\tb\nc\td\n", "1\nhigh\n", r"STS\.gs\.MSRvid\.txt, line 2: the score 'high'"),
        ("a\tb\nno tab\n", "1\n2\n", r"STS\.input\.MSRvid\.txt, line 2: expected two sentences"),
        (b"caf\xe9\tb\n", "1\n", r"STS\.input\.MSRvid\.txt is not UTF-8"),
    ],
)
def test_malformed_yearly_task_is_named(pairs, gold, match, small_senteval):
    write_yearly(small_senteval, "STS12", {"MSRvid": (pairs, gold)})
    with pytest.raises(InputError, match=match):
        load_sts("STS12")


def test_malformed_table_is_named(small_senteval):
    path = small_senteval / "STS/STSBenchmark/sts-test.csv"
    write(path, path.read_text() + "genre\tfile\tyear\tid\tfour\tA\tB\n")
    with pytest.raises(InputError, match=r"sts-test\.csv, line 2: the score 'four'"):
        load_sts("STSBenchmark")
    write(path, "genre\tfile\tyear\tid\t4\tonly one sentence\n")
    with pytest.raises(InputError, match=r"sts-test\.csv, line 1: expected 7 columns"):
        load_sts("STSBenchmark")


def test_unknown_task_and_split_are_refused(small_senteval):
    with pytest.raises(InputError, match="unknown task 'STS17': choose from STS12"):
        load_sts("STS17")
    with pytest.raises(InputError, match="STS12 has a test split only, not 'dev'"):
        load_sts("STS12", "dev")
    with pytest.raises(InputError, match="unknown split 'trial' of SICKRelatedness"):
        load_sts("SICKRelatedness", "trial")


@pytest.mark.usefixtures("no_sts_data")
def test_without_hub_and_folder_the_way_out_is_named():
    assert not hub_reachable()
    with pytest.raises(InputError, match="name a SentEval folder with --senteval or FCSE_SENTEVAL"):
        load_sts("STSBenchmark")
    with pytest.raises(InputError, match=r"wiki1m_for_simcse\.txt .* give a local path"):
        load_corpus("wiki1m")


def put_into_hub_cache(name, write_file):
    """Lay a file where the hub's client keeps what it has downloaded."""
    repository = Path(constants.HF_HUB_CACHE) / f"datasets--{HUB_DATASET.replace('/', '--')}"
    write(repository / "refs" / "main", "0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True, exist_ok=True)
    write_file(snapshot / name)
    return snapshot / name


@pytest.mark.usefixtures("no_sts_data")
def test_what_the_hub_gave_once_is_read_from_its_cache(small_senteval, monkeypatch, tmp_path):
    monkeypatch.delenv("FCSE_SENTEVAL")

    def archive(path):
        with tarfile.open(path, "w") as tar:
            tar.add(small_senteval, "SentEval/data/downstream")

    found = put_into_hub_cache("senteval.tar", archive)
    put_into_hub_cache("wiki1m_for_simcse.txt", lambda path: write(path, "One .\n\nTwo .\n"))
    assert load_corpus("wiki1m") == ["One .", "Two ."]
    for _ in range(2):
        assert load_sts("STSBenchmark", "dev").gold.tolist() == [2.0]
    (folder,) = (tmp_path / "cache" / "fcse").iterdir()
    assert folder.name == f"senteval-{sha256(found)[:12]}"


@pytest.mark.parametrize("task", STS_TASKS)
def test_pair_counts_are_those_of_senteval(task, senteval):
    pairs = load_sts(task, folder=senteval)
    assert len(pairs) == len(pairs.left) == len(pairs.right) == len(pairs.subsets) == PAIRS[task]
    assert pairs.gold.min() >= 0
    assert pairs.gold.max() <= pairs.maximum
    assert set(pairs.subsets) == set(STS_SUBSETS.get(task, [task]))
    assert not [s for s in (*pairs.left, *pairs.right) if s != " ".join(s.split())]
