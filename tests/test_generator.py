"""The masked language model that is made here, and the head with batch normalisation."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import one_line_refusal, train_until_interrupted
from transformers import AutoModelForMaskedLM

from fcse.encoder import SentenceEncoder, generator
from fcse.encoder.generator import trained_masked_lm
from fcse.encoder.sentence_encoder import BatchNormHead
from fcse.methods.diffcse import DiffCSE
from fcse.training import train
from fcse.training.corpora import TokenizedCorpus


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def corpus(sentences, tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(sentences), encoding="utf-8")
    return path


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "modernbert"])
def test_it_shares_its_words_and_is_kept(architecture, corpus, tiny_model, tmp_path, monkeypatch):
    encoder = SentenceEncoder.from_pretrained(tiny_model(architecture))
    before = {k: x.clone() for k, x in encoder.state_dict().items()}
    tokens = TokenizedCorpus.load(corpus, encoder, 32)
    fill, accuracy = trained_masked_lm(encoder, tokens, steps=10)
    assert accuracy.keys() == {"model", "unigrams"}
    assert all(0 <= share < 0.2 for share in accuracy.values())
    words = fill.model.get_input_embeddings().weight
    assert torch.equal(fill.model.get_output_embeddings().weight, words)
    for name, x in encoder.state_dict().items():
        assert torch.equal(x, before[name]), "the encoder is not changed"
    (folder,) = (path for path in (tmp_path / "cache/fcse").glob("masked-lm-*") if path.is_dir())
    assert json.loads((folder / "accuracy.json").read_text()) == accuracy
    written = (folder / "model.safetensors").stat().st_mtime_ns
    again, same = trained_masked_lm(encoder, tokens, steps=10)
    assert same == accuracy
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    ids = torch.tensor([tokens.batch(torch.arange(1).numpy())[1][0]])
    assert torch.equal(again(ids, ids < 0), fill(ids, ids < 0))
    AutoModelForMaskedLM.from_pretrained(folder)


def test_it_learns(corpus, tiny_model, monkeypatch):
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"))
    tokens = TokenizedCorpus.load(corpus, encoder, 32)
    measured = []
    kept = generator.nn.functional.cross_entropy

    def noted(*given):
        measured.append(kept(*given))
        return measured[-1]

    monkeypatch.setattr(generator.nn.functional, "cross_entropy", noted)
    trained_masked_lm(encoder, tokens)
    assert len(measured) == generator.STEPS
    first, last = (torch.stack(x).mean().item() for x in (measured[:10], measured[-10:]))
    assert last < first - 0.5


def test_other_sentences_or_weights_make_another(corpus, tiny_model, tmp_path):
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"))
    trained_masked_lm(encoder, TokenizedCorpus.load(corpus, encoder, 32), steps=2)
    corpus.write_text(corpus.read_text(encoding="utf-8") + "\nOne sentence more.")
    trained_masked_lm(encoder, TokenizedCorpus.load(corpus, encoder, 32), steps=2)
    with torch.no_grad():
        next(encoder.backbone.parameters()).add_(1)
    trained_masked_lm(encoder, TokenizedCorpus.load(corpus, encoder, 32), steps=2)
    found = [path for path in (tmp_path / "cache/fcse").glob("masked-lm-*") if path.is_dir()]
    assert len(found) == 3


def test_without_a_mask_token_it_is_refused(corpus, tiny_model):
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"))
    tokens = TokenizedCorpus.load(corpus, encoder, 32)
    encoder.tokenizer.mask_token = None
    with one_line_refusal("has no mask token"):
        trained_masked_lm(encoder, tokens)


@pytest.mark.parametrize("training", [True, False])
def test_the_head_with_batch_normalisation_is_the_formula(training, tiny_model):
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"))
    head = BatchNormHead(encoder.backbone, seed=1).double().train(training)
    x = torch.randn(6, 2, 1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, norm, _, last, last_norm = head
    assert first.bias is last.bias is None
    assert not last_norm.affine

    def normal(y, layer):
        mean, var = layer.running_mean, layer.running_var
        if training:
            mean, var = y.mean(0), y.var(0, correction=0)
        return (y - mean) / (var + layer.eps).sqrt()

    hidden = normal(x.reshape(12, 32) @ first.weight.T, norm) * norm.weight + norm.bias
    expected = normal(hidden.relu() @ last.weight.T, last_norm).view(x.shape)
    torch.testing.assert_close(head(x), expected, rtol=1e-9, atol=1e-9)
    again = BatchNormHead(encoder.backbone, seed=1)
    assert torch.equal(again[0].weight.double(), first.weight)
    assert not torch.equal(BatchNormHead(encoder.backbone, seed=2)[0].weight, again[0].weight)


@pytest.fixture
def config(tiny_config, corpus, tmp_path, monkeypatch):
    short = partial(trained_masked_lm, steps=4)
    monkeypatch.setattr(generator, "trained_masked_lm", short)
    config = tiny_config(tmp_path / "run", objective="info_nce", corpus=str(corpus))
    return replace(config, methods=(DiffCSE(),))


def test_a_run_says_how_good_its_generator_is_and_its_model_is_read_again(config):
    run = train(config)
    (remark,) = run.record["remarks"]
    assert remark.startswith("the generator of diffcse recovers ")
    assert "a draw of unigrams" in remark
    read = SentenceEncoder.from_pretrained(run.folder)
    assert isinstance(read.head, BatchNormHead)
    assert int(read.head[1].num_batches_tracked) == config.steps
    for mine, theirs in zip(read.parameters(), run.encoder.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_killed_run_goes_on_with_its_running_means(config, tmp_path):
    undisturbed = train(replace(config, output=str(tmp_path / "undisturbed")))
    train_until_interrupted(config, 4)
    again = train(config)
    assert again.losses == undisturbed.losses
    mine, theirs = (x.encoder.head.state_dict() for x in (again, undisturbed))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_two_processes_cannot_share_a_batch_that_is_normalised(config, two_processes):

    encoder = SentenceEncoder.from_pretrained(config.encoder)
    from fcse.methods import Start

    with one_line_refusal("batch_norm needs a batch in one process: set diffcse.batch_norm to"):
        DiffCSE().begin(Start(config, encoder, None))
