"""Folders in the layout of sentence-transformers, from us to it and from it to us."""

import json
import shutil
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import scipy.stats
import torch
from conftest import CONFIGS, one_line_refusal
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Transformer,
    WeightedLayerPooling,
)
from sentence_transformers.sentence_transformer.modules import Pooling as PoolingModule
from transformers import AutoModel, AutoTokenizer

from fcse.data import MINILM, load_lee
from fcse.encoder import SentenceEncoder
from fcse.encoder.pooling import Pooling
from fcse.evaluation import judge
from fcse.recipes import recipe
from fcse.training import train

POOLINGS = get_args(Pooling)
FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
}
"""What every version of sentence-transformers wrote before `pooling_mode`."""


@pytest.fixture(scope="module")
def texts(sentences):
    """Sentences of unlike lengths, all within what a tiny model takes."""
    return [sentences[0][:60], "Yes.", *[s[:90] for s in sentences[1:5]], "Two words."]


@pytest.fixture
def written(tiny_model, tmp_path):
    """Modules behind the transformer -> folder that sentence-transformers itself wrote."""

    def write(*modules, architecture="bert", **options):
        transformer = Transformer(str(tiny_model(architecture)), **options)
        model = SentenceTransformer(modules=[transformer, *modules], device="cpu")
        model.save(str(tmp_path / "written"))
        return tmp_path / "written"

    return write


@pytest.fixture(scope="module")
def written_once(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "cls"
    modules = [Transformer(str(tiny_model("bert"))), PoolingModule(32, "cls")]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder


@pytest.fixture
def written_cls(written_once, tmp_path):
    """A copy of a folder that sentence-transformers wrote, to break."""
    return shutil.copytree(written_once, tmp_path / "copy")


def embed_elsewhere(folder, texts):
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return model.encode(texts, show_progress_bar=False)


@torch.no_grad()
def embed_by_hand(folder, texts, pooling, limit):
    model, tokenizer = (
        AutoModel.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    batch = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    tokens, mask = model(**batch).last_hidden_state, batch["attention_mask"].bool()
    if pooling == "cls":
        return tokens[:, 0].numpy()
    return np.stack([x[m].mean(0).numpy() for x, m in zip(tokens, mask, strict=True)])


def rewrite(path, change):
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_is_saved_loads_elsewhere(architecture, pooling, tiny_model, texts, tmp_path):
    encoder = SentenceEncoder.from_pretrained(tiny_model(architecture), pooling)
    encoder.save_pretrained(tmp_path)
    # One text beyond the limit: it has to be cut at the same token.
    texts = [*texts, " ".join(texts) * 2]
    embeddings = encoder.encode(texts)
    assert len(encoder.tokenize(texts)[-1]) == encoder.max_length
    np.testing.assert_allclose(embed_elsewhere(tmp_path, texts), embeddings, atol=1e-5)
    if pooling in ("cls", "mean"):
        by_hand = embed_by_hand(tmp_path, texts, pooling, encoder.max_length)
        np.testing.assert_allclose(by_hand, embeddings, atol=1e-5)

    again = SentenceEncoder.from_pretrained(tmp_path)
    assert again.pooling == pooling
    np.testing.assert_array_equal(again.encode(texts), embeddings)


def test_poolings_of_one_model_differ(tiny_model, texts):
    # Else a wrong pooling would go unseen wherever embeddings are compared here.
    for architecture in CONFIGS:
        embeddings = [
            SentenceEncoder.from_pretrained(tiny_model(architecture), pooling).encode(texts)
            for pooling in POOLINGS
        ]
        for i, x in enumerate(embeddings):
            assert all(np.abs(x - y).max() > 1e-3 for y in embeddings[:i])


def test_saving_over_another_pooling_leaves_none_of_it(tiny_model, texts, tmp_path):
    for pooling in ("mean_top2", "cls"):
        encoder = SentenceEncoder.from_pretrained(tiny_model("bert"), pooling)
        encoder.save_pretrained(tmp_path)
    assert SentenceEncoder.from_pretrained(tmp_path).pooling == "cls"
    np.testing.assert_allclose(embed_elsewhere(tmp_path, texts), encoder.encode(texts), atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "pooling", "normalize"),
    [(architecture, pooling, False) for architecture in CONFIGS for pooling in ("cls", "mean")]
    + [("bert", "cls", True), ("roberta", "mean", True)],
)
def test_what_was_saved_elsewhere_loads(architecture, pooling, normalize, written, texts):
    modules = [PoolingModule(32, pooling)] + [Normalize()] * normalize
    folder = written(*modules, architecture=architecture)
    encoder = SentenceEncoder.from_pretrained(folder)
    assert encoder.pooling == pooling
    np.testing.assert_allclose(
        encoder.encode(texts, normalize=normalize), embed_elsewhere(folder, texts), atol=1e-5
    )


def test_scores_are_those_of_sentence_transformers(written):
    folder = written(PoolingModule(32, "mean"), Normalize())
    lee = load_lee()
    documents = list(dict.fromkeys([*lee.left, *lee.right]))
    row = dict(zip(documents, embed_elsewhere(folder, documents), strict=True))
    cosine = [row[a] @ row[b] for a, b in zip(lee.left, lee.right, strict=True)]
    expected = 100 * scipy.stats.spearmanr(cosine, lee.gold).statistic
    score = judge(SentenceEncoder.from_pretrained(folder), lee)["spearman"]
    assert score == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("first", "pooling"), [(1, "mean_first_last"), (2, "mean_top2")])
def test_two_layers_written_elsewhere_are_read(first, pooling, written, texts):
    weights = torch.ones(4 - first)
    weights[1:-1] = 0
    layers = WeightedLayerPooling(
        32, 3, layer_start=first, layer_weights=torch.nn.Parameter(weights)
    )
    folder = written(
        layers, PoolingModule(32, "mean"), config_kwargs={"output_hidden_states": True}
    )
    encoder = SentenceEncoder.from_pretrained(folder)
    assert encoder.pooling == pooling
    np.testing.assert_allclose(encoder.encode(texts), embed_elsewhere(folder, texts), atol=1e-5)


def old_layout(folder):
    """Move the transformer into a folder of its own, and name modules as they were then."""
    top = [p for p in folder.iterdir() if p.is_file() and p.name != "modules.json"]
    (folder / "0_Transformer").mkdir()
    for path in top:
        path.rename(folder / "0_Transformer" / path.name)

    def as_then(modules):
        modules[0]["path"] = "0_Transformer"
        for module in modules:
            module["type"] = f"sentence_transformers.models.{module['type'].split('.')[-1]}"
        return modules

    rewrite(folder / "modules.json", as_then)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_old_layout_is_read(pooling, written, texts):
    folder = written(PoolingModule(32, pooling))
    old_layout(folder)
    encoder = SentenceEncoder.from_pretrained(folder)
    assert encoder.pooling == pooling
    np.testing.assert_allclose(encoder.encode(texts), embed_elsewhere(folder, texts), atol=1e-5)


def test_the_old_layout_without_weights_is_refused(written_cls):
    old_layout(written_cls)
    (written_cls / "0_Transformer" / "model.safetensors").unlink()
    with one_line_refusal("0_Transformer has no weights"):
        SentenceEncoder.from_pretrained(written_cls)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("spelling", ["flags", "pooling_mode", "list"])
def test_both_spellings_of_a_mode_are_read(spelling, pooling, written_cls, texts):
    mode = {
        "flags": {flag: mode == pooling for mode, flag in FLAGS.items()},
        "pooling_mode": {"pooling_mode": pooling},
        "list": {"pooling_mode": [pooling]},
    }[spelling]
    rewrite(
        written_cls / "1_Pooling" / "config.json", lambda _: {"word_embedding_dimension": 32} | mode
    )
    encoder = SentenceEncoder.from_pretrained(written_cls)
    assert encoder.pooling == pooling
    np.testing.assert_allclose(
        encoder.encode(texts), embed_elsewhere(written_cls, texts), atol=1e-5
    )


@pytest.mark.parametrize(
    ("modules", "named"),
    [
        ([PoolingModule(32, "max")], "declares max"),
        ([PoolingModule(32, ("cls", "mean"))], r"declares cls \+ mean"),
        ([PoolingModule(32, "mean"), Dense(32, 16)], r"declares Pooling \+ Dense"),
        ([PoolingModule(32, "lasttoken"), Normalize()], "declares lasttoken"),
        (
            [WeightedLayerPooling(32, 3, layer_start=1), PoolingModule(32, "mean")],
            r"declares WeightedLayerPooling \+ mean",
        ),
        (
            [WeightedLayerPooling(32, 3, layer_start=2), PoolingModule(32, "cls")],
            r"declares WeightedLayerPooling \+ cls",
        ),
        ([], "declares no pooling"),
    ],
    ids=str,
)
def test_what_is_not_read_is_named_and_can_be_overridden(
    modules, named, written, tiny_model, texts
):
    folder = written(*modules)
    with one_line_refusal(named):
        SentenceEncoder.from_pretrained(folder)
    for pooling in ("cls", "mean"):
        plain = SentenceEncoder.from_pretrained(tiny_model("bert"), pooling)
        encoder = SentenceEncoder.from_pretrained(folder, pooling)
        assert encoder.pooling == pooling
        np.testing.assert_array_equal(encoder.encode(texts), plain.encode(texts))


def test_several_flags_are_named(written_cls):
    flags = {FLAGS["max"]: True, FLAGS["mean"]: True, FLAGS["cls"]: False}
    rewrite(written_cls / "1_Pooling" / "config.json", lambda _: flags)
    with one_line_refusal(r"declares mean \+ max"):
        SentenceEncoder.from_pretrained(written_cls)


def test_an_explicit_pooling_overrides_a_readable_one(written_cls, tiny_model, texts):
    encoder = SentenceEncoder.from_pretrained(written_cls, "mean")
    plain = SentenceEncoder.from_pretrained(tiny_model("bert"), "mean")
    np.testing.assert_array_equal(encoder.encode(texts), plain.encode(texts))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("modules.json", b""),
        ("modules.json", b"{"),
        ("modules.json", b"\xff\xfe"),
        ("modules.json", b"3"),
        ("modules.json", b"null"),
        ("modules.json", b'"text"'),
        ("modules.json", b'["Pooling"]'),
        ("modules.json", b'{"Pooling": "1_Pooling"}'),
        ("modules.json", b'[{"path": "1_Pooling"}]'),
        ("modules.json", b'[{"type": "models.Pooling"}]'),
        ("modules.json", b'[{"type": 3, "path": "1_Pooling"}]'),
        ("modules.json", b'[{"type": "models.Pooling", "path": 3}]'),
        ("modules.json", b'[{"type": "models.Pooling", "path": "no_such_folder"}]'),
        ("1_Pooling/config.json", b""),
        ("1_Pooling/config.json", b'{"pooling_mode": "cls"'),
        ("1_Pooling/config.json", b"\xff\xfe"),
        ("1_Pooling/config.json", b"null"),
        ("1_Pooling/config.json", b"[]"),
        ("1_Pooling/config.json", b"{}"),
        ("1_Pooling/config.json", b'{"word_embedding_dimension": 32}'),
        ("1_Pooling/config.json", b'{"pooling_mode": 3}'),
        ("1_Pooling/config.json", b'{"pooling_mode": ""}'),
        ("1_Pooling/config.json", b'{"pooling_mode": []}'),
        ("1_Pooling/config.json", b'{"pooling_mode": [1, 2]}'),
        ("1_Pooling/config.json", b'{"pooling_mode_cls_token": false}'),
    ],
)
def test_a_broken_declaration_is_refused(name, content, written_cls):
    (written_cls / name).write_bytes(content)
    with one_line_refusal(r"mend its modules\.json"):
        SentenceEncoder.from_pretrained(written_cls)


def test_a_missing_declaration_is_refused(written_cls):
    (written_cls / "1_Pooling" / "config.json").unlink()
    with one_line_refusal(r"mend its modules\.json"):
        SentenceEncoder.from_pretrained(written_cls)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{}"),
        ("config.json", b'{"num_hidden_layers": "3"}'),
        ("model.safetensors", b"no weights"),
    ],
)
def test_broken_layer_weights_are_refused(name, content, tiny_model, tmp_path):
    SentenceEncoder.from_pretrained(tiny_model("bert"), "mean_top2").save_pretrained(tmp_path)
    (tmp_path / "1_WeightedLayerPooling" / name).write_bytes(content)
    with one_line_refusal(r"mend its modules\.json"):
        SentenceEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("pooling", ["mean_first_last", "mean_top2"])
def test_few_layers_are_declared_too(pooling, layers, tiny_model, texts, tmp_path):
    # Of two layers both poolings average the same ones, of one layer the first is the last.
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"), pooling)
    encoder.backbone.encoder.layer = encoder.backbone.encoder.layer[:layers]
    encoder.backbone.config.num_hidden_layers = layers
    encoder.save_pretrained(tmp_path)
    embeddings = encoder.encode(texts)
    again = SentenceEncoder.from_pretrained(tmp_path)
    np.testing.assert_allclose(again.encode(texts), embeddings, atol=1e-6)
    np.testing.assert_allclose(embed_elsewhere(tmp_path, texts), embeddings, atol=1e-5)


def test_layer_weights_under_another_name_are_refused(tiny_model, tmp_path):
    SentenceEncoder.from_pretrained(tiny_model("bert"), "mean_top2").save_pretrained(tmp_path)
    weights = tmp_path / "1_WeightedLayerPooling" / "model.safetensors"
    save_file({"other": torch.ones(2)}, weights)
    with one_line_refusal(r"mend its modules\.json"):
        SentenceEncoder.from_pretrained(tmp_path)
    weights.unlink()
    with one_line_refusal("declares WeightedLayerPooling"):
        SentenceEncoder.from_pretrained(tmp_path)


def test_a_plain_folder_declares_nothing_and_is_read_as_cls(tiny_model):
    assert SentenceEncoder.from_pretrained(tiny_model("bert")).pooling == "cls"


def test_the_packaged_encoder_by_name_is_read_as_cls(minilm, texts):
    # Its folder declares the mean it was tuned for; by name it is the untuned starting point.
    folder = MINILM.locate().parent
    declared = SentenceEncoder.from_pretrained(folder)
    assert (minilm.pooling, declared.pooling) == ("cls", "mean")
    assert SentenceEncoder.from_pretrained("minilm", "mean_top2").pooling == "mean_top2"
    np.testing.assert_allclose(
        declared.encode(texts, normalize=True), embed_elsewhere(folder, texts), atol=1e-5
    )


@pytest.mark.parametrize("pooling", ["cls", "mean_first_last"])
def test_a_run_folder_is_an_encoder(pooling, tiny_model, small_corpus, texts, tmp_path):
    config = replace(
        recipe("minilm-wiki"),
        encoder=str(tiny_model("bert")),
        corpus=str(small_corpus),
        pooling=pooling,
        steps=2,
        batch_size=8,
        output=str(tmp_path / "run"),
    )
    kept = train(config).encoder
    for folder in (tmp_path / "run", tmp_path / "run" / "model"):
        encoder = SentenceEncoder.from_pretrained(folder)
        assert encoder.pooling == pooling
        np.testing.assert_array_equal(encoder.encode(texts), kept.encode(texts))
        torch.testing.assert_close(encoder.head.state_dict(), kept.head.state_dict())
    np.testing.assert_allclose(
        embed_elsewhere(tmp_path / "run" / "model", texts), kept.encode(texts), atol=1e-5
    )


def test_a_run_folder_without_a_model_is_refused(tiny_model, small_corpus, tmp_path):
    config = replace(
        recipe("minilm-wiki"),
        encoder=str(tiny_model("bert")),
        corpus=str(small_corpus),
        steps=1,
        batch_size=8,
        output=str(tmp_path / "run"),
    )
    shutil.rmtree(train(config).folder / "model")
    with one_line_refusal("run"):
        SentenceEncoder.from_pretrained(tmp_path / "run")
