"""Retrieved negatives, case switching and pseudo-labels against what they are defined to be."""

import random

import numpy as np
import pytest
import torch
from conftest import make_tokenizer, one_line_refusal
from transformers import AutoTokenizer

from fcse.config import TrainConfig
from fcse.encoder import SentenceEncoder
from fcse.encoder.nearest import nearest
from fcse.methods import Start
from fcse.methods.cards import CARDS, drawn, require_cased, switch_case, switched
from fcse.methods.ifnd import TEMPERATURE, accepted, pseudo_labels
from fcse.training.corpora import TokenizedCorpus

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

OUTSIDE = (-0.01, 1.01, float("nan"))


def brute_force(embeddings, k, ids=None):
    """The whole matrix of cosines in float64, sorted; and the cosines themselves."""
    x = np.asarray(embeddings, dtype=np.float64)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    x = np.divide(x, lengths, out=np.zeros_like(x), where=lengths > 0)
    ids = np.arange(len(x)) if ids is None else np.asarray(ids)
    cosines = np.where(ids[:, None] == ids, -np.inf, x @ x.T)
    return np.argsort(-cosines, axis=1, kind="stable")[:, :k], cosines


def exact_rows(rows):
    """Rows with four entries of 1 or -1: cosines are multiples of 1/4 in any precision."""
    x = np.zeros((len(rows), 8), dtype=np.float32)
    for i, (places, signs) in enumerate(rows):
        x[i, list(places)] = signs
    return x


ROW = st.tuples(
    st.permutations(range(8)).map(lambda places: places[:4]),
    st.lists(st.sampled_from((-1, 1)), min_size=4, max_size=4),
)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tile", [7, 100, 1024])
def test_nearest_of_random_rows_are_those_of_the_whole_matrix(dtype, tile):
    x = np.random.default_rng(0).normal(size=(150, 24)).astype(dtype)
    found = nearest(x, 12, tile=tile)
    expected, cosines = brute_force(x, 12)
    assert found.shape == (150, 12)
    assert found.dtype == np.int32
    # Neighbours whose cosines the rounding cannot tell apart may change places.
    found_cosines = np.take_along_axis(cosines, found, 1)
    np.testing.assert_allclose(found_cosines, np.take_along_axis(cosines, expected, 1), atol=1e-6)
    assert all(len(set(row)) == 12 for row in found)
    assert (found == expected).mean() > 0.99


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_ties_and_repeats_are_exactly_those_of_the_whole_matrix(data):
    rows = data.draw(st.lists(ROW, min_size=2, max_size=14))
    n = len(rows)
    ids = data.draw(st.none() | st.lists(st.integers(0, 4), min_size=n, max_size=n))
    repeats = 1 if ids is None else max(ids.count(i) for i in ids)
    if repeats == n:
        return
    k = data.draw(st.integers(1, n - repeats))
    tile = data.draw(st.integers(1, n + 1))
    scale = data.draw(st.sampled_from((1, 8)))  # the length of a row has no part in a cosine
    x = exact_rows(rows)
    x[0] *= scale
    expected, _ = brute_force(x, k, ids)
    for dtype in (np.float32, np.float16):
        found = nearest(
            x.astype(dtype), k, None if ids is None else np.array(ids, np.uint32), tile=tile
        )
        np.testing.assert_array_equal(found, expected)


def test_a_zero_row_has_cosine_zero_with_everything():
    x = np.array([[0, 0], [1, 0], [-1, 0], [0, 1]], dtype=np.float32)
    np.testing.assert_array_equal(nearest(x, 3, tile=3), brute_force(x, 3)[0])


def test_nearest_takes_a_tensor_and_a_device_and_leaves_it_as_it_was():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    found = nearest(x, 5, torch.arange(40) // 2, device="cpu", tile=16)
    assert torch.equal(x, before)
    np.testing.assert_array_equal(found, nearest(x.numpy(), 5, np.arange(40) // 2, tile=16))
    assert (found // 2 != np.arange(40)[:, None] // 2).all()


def test_real_sentences_that_are_one_sentence_are_no_neighbours(minilm, sentences):
    texts = [*sentences[:30], *sentences[:5]]
    x = minilm.encode(texts)
    ids = np.unique(texts, return_inverse=True)[1]
    twins = nearest(x, 1)[:5, 0]
    np.testing.assert_array_equal(twins, np.arange(30, 35))
    apart = nearest(x, 3, ids)
    assert (ids[apart] != ids[:, None]).all()


def test_neighbours_kept_from_another_length_are_not_taken(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    starts = ("A river of the north", "The people that", "In his later years", "Some of these")
    lines = [f"{start} {end}" for start in starts for end in ("was first.", "were two.", "and.")]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"), "mean")
    found, ids = {}, {}
    for length in (32, 4):
        config = TrainConfig(max_length=length)
        corpus = TokenizedCorpus.load(tmp_path / "lines.txt", encoder, length)
        found[length] = (
            CARDS(k=3, case_switch=0.0).begin(Start(config, encoder, corpus)).nearest[:, 1:]
        )
        ids[length] = corpus.ids()
    same = ids[4][found[32]] == ids[4][:, None]
    assert same.any(), "cut to 4 tokens, neighbours of a whole sentence are that sentence again"
    assert (ids[4][found[4]] != ids[4][:, None]).all()


@pytest.mark.parametrize("k", [-1, 0, 6])
def test_k_that_the_corpus_does_not_allow_is_refused(k):
    with one_line_refusal(f"k must be from 1 to 5, .* 6 sentences of the corpus .* got {k}"):
        nearest(np.eye(6, dtype=np.float32), k)


def test_repeats_lower_the_k_that_the_corpus_allows():
    x, ids = np.eye(6, dtype=np.float32), [0, 0, 0, 1, 2, 3]
    assert nearest(x, 3, ids).shape == (6, 3)
    with one_line_refusal("from 1 to 3"):
        nearest(x, 4, ids)
    with one_line_refusal("from 1 to 0"):
        nearest(x[:0], 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_embeddings_that_are_not_finite_are_refused(value):
    x = np.eye(6, dtype=np.float16)
    x[4, 0] = value
    with one_line_refusal("embed the corpus in float32"):
        nearest(x, 2, tile=2)
    with one_line_refusal("embed the corpus in float32"):
        pseudo_labels(x, 2, 1.0, seed=0)


def test_other_shapes_are_refused():
    x = np.eye(6, dtype=np.float32)
    with pytest.raises(ValueError, match="tile"):
        nearest(x, 1, tile=0)
    with pytest.raises(ValueError, match=r"\(6,\)"):
        nearest(x, 1, np.arange(5))
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        nearest(x[0], 1)
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        pseudo_labels(x[0], 2, 1.0, seed=0)


def test_a_draw_depends_on_seed_and_step_alone():
    neighbours = nearest(np.random.default_rng(1).normal(size=(200, 8)).astype(np.float32), 8)
    rows = np.random.default_rng(2).permutation(200)[:64].astype(np.uint32)
    first = [drawn(neighbours, rows, seed=3, step=step) for step in range(10)]
    np.random.seed(99)
    torch.manual_seed(99)
    resumed = [drawn(neighbours, rows, seed=3, step=step) for step in range(5, 10)]
    np.testing.assert_array_equal(first[5:], resumed)
    assert len({tuple(draw) for draw in first}) == 10
    assert not np.array_equal(first[0], drawn(neighbours, rows, seed=4, step=0))
    assert all((neighbours[rows] == draw[:, None]).any(axis=1).all() for draw in first)


def test_each_neighbour_is_drawn_equally_often():
    neighbours = np.arange(4)[None].repeat(1000, 0)
    rows = np.arange(1000)
    draws = np.concatenate([drawn(neighbours, rows, seed=0, step=step) for step in range(20)])
    # Five standard deviations of a binomial count.
    assert np.abs(np.bincount(draws, minlength=4) - 5000).max() < 5 * np.sqrt(20_000 * 3 / 16)


def words(sentence):
    return sentence.split(" ")


def test_only_first_letters_change_and_only_their_case(sentences):
    texts = sentences[:100]
    second = switched(texts, 0.5, 2, seed=0, step=1)
    for before, after in zip(texts, second, strict=True):
        assert len(after) == len(before)
        for old, new in zip(words(before), words(after), strict=True):
            assert new in (old, old[0].swapcase() + old[1:])
    assert second != texts
    assert switched(texts, 0, 2, seed=0, step=1) == texts
    for variant in (1, 2):
        every = switched(texts, 1, variant, seed=0, step=1)
        assert switched(every, 1, variant, seed=0, step=1) == texts


def changed(before, after):
    return [old != new for old, new in zip(words(before), words(after), strict=True)]


@pytest.mark.parametrize("share", [0.05, 0.15, 0.5])
def test_each_word_is_switched_with_the_probability_asked(sentences, share):
    flips = [
        flip
        for before, after in zip(sentences, switched(sentences, share, 2, 0, 0), strict=True)
        for word, flip in zip(words(before), changed(before, after), strict=True)
        if word[0].swapcase() != word[0]
    ]
    assert abs(sum(flips) - share * len(flips)) < 5 * np.sqrt(share * (1 - share) * len(flips))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_the_other_variant_takes_a_share_of_the_words_and_at_least_one(share):
    texts = [" ".join(["word"] * n) for n in (1, 3, 10, 25)]
    counts = [
        sum(changed(*pair)) for pair in zip(texts, switched(texts, share, 1, 0, 0), strict=True)
    ]
    assert counts == [max(1, int(share * n)) for n in (1, 3, 10, 25)]
    first = {
        changed(texts[-1], switched(texts[-1:], share, 1, 0, s)[0]).index(True) for s in range(30)
    }
    assert len(first) > 1, "always the same words"


def test_what_has_no_other_case_of_one_letter_stays():
    text = 'Ein ßtraße "Wort" 12th 東京  İzmir'
    assert switch_case(text, 1, 2, np.random.default_rng(0)) == text.replace("Ein", "ein")


def test_switching_depends_on_seed_and_step_alone(sentences):
    texts = sentences[:16]
    first = [switched(texts, 0.15, 2, seed=1, step=step) for step in range(4)]
    random.seed(5)
    np.random.seed(5)
    assert switched(texts, 0.15, 2, seed=1, step=3) == first[3]
    assert len({tuple(view) for view in first}) == 4
    assert switched(texts, 0.15, 2, seed=2, step=3) != first[3]


@pytest.mark.parametrize("share", OUTSIDE)
def test_a_share_of_words_outside_the_unit_interval_is_refused(share):
    with one_line_refusal("share of words .* between 0 and 1"):
        switched(["one sentence"], share, 2, seed=0, step=0)


def test_switching_changes_the_tokens_of_a_cased_vocabulary_only(tiny_model, sentences):
    cased, uncased = (AutoTokenizer.from_pretrained(tiny_model(n)) for n in ("roberta", "bert"))
    texts = [text for text in sentences[:60] if text.isascii()]
    second = switched(texts, 0.5, 2, seed=0, step=0)
    assert second != texts
    require_cased(cased)
    assert cased(second)["input_ids"] != cased(texts)["input_ids"]
    with one_line_refusal("cased vocabulary.*case_switch = 0, the retrieved negatives still work"):
        require_cased(uncased)
    assert uncased(second)["input_ids"] == uncased(texts)["input_ids"]


def test_casedness_is_asked_of_the_tokens_and_not_of_the_name(sentences):
    tokenizer = make_tokenizer(sentences, byte_pairs=True)
    tokenizer.name_or_path = "bert-base-uncased"
    require_cased(tokenizer)


def blobs(n=240, clusters=4, noise=0.05, seed=0):
    """Embeddings about `clusters` orthogonal directions, of any length, and which is whose."""
    generator = np.random.default_rng(seed)
    truth = generator.integers(clusters, size=n)
    directions = np.eye(clusters, 16)[truth]
    x = directions + generator.normal(scale=noise, size=(n, 16))
    return (x * generator.uniform(0.5, 5, size=(n, 1))).astype(np.float32), truth


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_clusters_of_separate_blobs_are_the_blobs(dtype):
    x, truth = blobs()
    labels = pseudo_labels(x.astype(dtype), 4, 1.0, seed=0)
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels[:, None] == labels, truth[:, None] == truth)


def test_a_larger_share_keeps_the_same_labels_and_more():
    x, _ = blobs(noise=0.3)
    whole = pseudo_labels(x, 4, 1.0, seed=0)
    assert set(whole) <= set(range(4))
    kept_before = np.zeros(len(x), dtype=bool)
    for share in (0, 0.003, 0.1, 0.35, 0.8, 1):
        labels = pseudo_labels(x, 4, share, seed=0)
        kept = labels != -1
        assert kept.sum() == int(share * len(x))
        assert kept[kept_before].all()
        np.testing.assert_array_equal(labels[kept], whole[kept])
        kept_before = kept


def test_what_is_kept_lies_nearest_to_its_own_centroid_among_all():
    # Two directions and a row between them: the least confident of all.
    x = np.array([[1, 0]] * 6 + [[0, 1]] * 6 + [[1, 0.9]], dtype=np.float32)
    labels = pseudo_labels(x, 2, 12 / 13, seed=0)
    assert labels[12] == -1
    assert (labels[:12] != -1).all()


def test_confidence_is_the_softmax_share_of_the_own_centroid():
    x, truth = blobs(noise=0.2)
    kept = pseudo_labels(x, 4, 0.5, seed=0) != -1
    # The centroids of separate blobs are their means, up to what mini-batches leave.
    unit = x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    means = np.stack([unit[truth == c].mean(0) for c in range(4)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    shares = np.exp(unit @ means.T / TEMPERATURE)
    confidence = shares[np.arange(len(x)), truth] / shares.sum(1)
    expected = np.zeros(len(x), dtype=bool)
    expected[np.argsort(-confidence)[: len(x) // 2]] = True
    assert (kept == expected).mean() > 0.9


def test_equal_confidences_go_by_the_lower_index():
    x = np.repeat(np.eye(2, dtype=np.float32), 10, axis=0)
    for share in (0.25, 0.7):
        kept = (pseudo_labels(x, 2, share, seed=0) != -1).reshape(2, 10)
        assert kept.sum() == share * 20
        # Rows of one direction are equally confident: those kept come first.
        assert (kept[:, :-1] >= kept[:, 1:]).all()


def test_labels_depend_on_the_seed_alone():
    x, _ = blobs(n=300, clusters=8, noise=0.4)
    before = x.copy()
    first = pseudo_labels(x, 12, 0.5, seed=7)
    np.random.seed(1)
    np.testing.assert_array_equal(pseudo_labels(x, 12, 0.5, seed=7), first)
    np.testing.assert_array_equal(x, before)
    assert any((pseudo_labels(x, 12, 0.5, seed=seed) != first).any() for seed in range(3))


def test_the_accepted_share_grows_evenly_and_is_reached():
    for steps, every in ((11, 1), (100, 25), (101, 25), (6, 2)):
        times = [step for step in range(1, steps) if step % every == 0]  # ahead of another step
        shares = [accepted(step, steps, every, 0.6) for step in times]
        np.testing.assert_allclose(shares, 0.6 * np.arange(1, len(times) + 1) / len(times))
        assert shares[-1] == 0.6


def test_acceptance_zero_keeps_nothing_at_any_step():
    x, _ = blobs()
    for step in (0, 5, 10):
        assert (pseudo_labels(x, 4, accepted(step, 11, 1, 0), seed=0) == -1).all()


@pytest.mark.parametrize("share", OUTSIDE)
def test_shares_of_labels_outside_the_unit_interval_are_refused(share):
    with one_line_refusal("share must lie between 0 and 1"):
        pseudo_labels(np.eye(4, dtype=np.float32), 2, share, seed=0)
    with one_line_refusal("acceptance must lie between 0 and 1"):
        accepted(1, 10, 1, share)


@pytest.mark.parametrize("clusters", [-1, 0, 1, 5])
def test_a_number_of_clusters_that_the_corpus_does_not_allow_is_refused(clusters):
    with one_line_refusal(f"clusters must be from 2 to 4, .* got {clusters}"):
        pseudo_labels(np.eye(4, dtype=np.float32), clusters, 1.0, seed=0)
