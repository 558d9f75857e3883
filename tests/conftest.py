"""Real weights, real text, and tiny random models of each architecture, made once a session."""

import os
import signal
from contextlib import contextmanager
from dataclasses import replace

# The suite never asks a network: a hub that answers slowly must not decide how a test ends.
os.environ["HF_HUB_OFFLINE"] = "1"
# On tensors as small as these, threads that share busy cores wait for each other: ten times slower.
os.environ["OMP_NUM_THREADS"] = "1"
# UMAP's compiler gives its own number to torch too, and sums over two threads round differently.
os.environ["NUMBA_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from fcse import processes
from fcse.config import TrainConfig
from fcse.data import load_corpus, load_lee
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError
from fcse.evaluation import judge
from fcse.methods import Start
from fcse.training import train
from fcse.training.batches import make_batch
from fcse.training.corpora import TokenizedCorpus

# A shell's background job ignores Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

TOKEN_LIMIT = 64
"""Tokens that every tiny model takes; RoBERTa's and MPNet's tables have two rows more."""

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}


def bert_config(vocabulary, **changes):
    return BertConfig(
        **SIZES | {"vocab_size": vocabulary, "max_position_embeddings": TOKEN_LIMIT} | changes
    )


def roberta_config(vocabulary):
    return RobertaConfig(
        **SIZES,
        vocab_size=vocabulary,
        max_position_embeddings=TOKEN_LIMIT + 2,
        type_vocab_size=1,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


def distilbert_config(vocabulary):
    return DistilBertConfig(
        vocab_size=vocabulary,
        dim=32,
        n_layers=3,
        n_heads=4,
        hidden_dim=64,
        max_position_embeddings=TOKEN_LIMIT,
    )


def mpnet_config(vocabulary):
    return MPNetConfig(
        **SIZES,
        vocab_size=vocabulary,
        max_position_embeddings=TOKEN_LIMIT + 2,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
    )


def modernbert_config(vocabulary):
    # Four layers and a window of 16 tokens, so that local and global attention both take part.
    return ModernBertConfig(
        **SIZES | {"num_hidden_layers": 4},
        vocab_size=vocabulary,
        max_position_embeddings=TOKEN_LIMIT,
        local_attention=16,
        global_attn_every_n_layers=3,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
    )


CONFIGS = {
    "bert": bert_config,
    "roberta": roberta_config,
    "distilbert": distilbert_config,
    "mpnet": mpnet_config,
    "modernbert": modernbert_config,
}


def _word_pieces(cased=False):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    return tokenizer, trainer, dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))


def _byte_pairs():
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return tokenizer, trainer, dict(zip(("cls", "pad", "sep", "unk", "mask"), special, strict=True))


def make_tokenizer(text, byte_pairs=False, cased=False):
    """A fast tokenizer trained on `text`, without a length limit of its own."""
    tokenizer, trainer, special = _byte_pairs() if byte_pairs else _word_pieces(cased)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = TemplateProcessing(
        single=f"{special['cls']} $A {special['sep']}",
        special_tokens=[
            (special[name], tokenizer.token_to_id(special[name])) for name in ("cls", "sep")
        ],
    )
    named = {f"{name}_token": token for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def save_tiny_model(config, tokenizer, folder, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextmanager
def one_line_refusal(match):
    """Within this context an InputError of one line is raised that says `match`."""
    with pytest.raises(InputError, match=match) as refusal:
        yield
    assert "\n" not in str(refusal.value)


def train_until_interrupted(config, last):
    """Train until Ctrl-C comes after a step."""

    def stop(step, encoder):
        if step == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, stop)


def elsewhere(config, tmp_path, name, **changes):
    """The config with changes, in another folder."""
    return replace(config, output=str(tmp_path / name), **changes)


def lee_score(encoder):
    """100 x Spearman on the packaged judgements."""
    return judge(encoder, load_lee())["spearman"]


@pytest.fixture(scope="session")
def sentences():
    """Real sentences: the head of the packaged corpus."""
    return load_corpus("wiki-mini", limit=400)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, sentences):
    """Architecture -> folder of a tiny random model with a tokenizer trained on real text."""
    made = {}

    def folder(architecture):
        if architecture not in made:
            byte_pairs = architecture in ("roberta", "mpnet")
            tokenizer = make_tokenizer(sentences, byte_pairs)
            made[architecture] = save_tiny_model(
                CONFIGS[architecture](len(tokenizer)),
                tokenizer,
                tmp_path_factory.mktemp("models") / architecture,
            )
        return made[architecture]

    return folder


@pytest.fixture(scope="session")
def still_model(tmp_path_factory, sentences):
    """Folder of a tiny BERT without any dropout: a batch's loss depends on the batch alone."""
    tokenizer = make_tokenizer(sentences)
    config = bert_config(len(tokenizer), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return save_tiny_model(config, tokenizer, tmp_path_factory.mktemp("models") / "still")


@pytest.fixture(scope="session")
def minilm():
    """The packaged encoder, in evaluation mode."""
    return SentenceEncoder.from_pretrained("minilm")


@pytest.fixture(scope="session")
def small_corpus(tmp_path_factory, sentences):
    """Text file with the first 40 real sentences."""
    path = tmp_path_factory.mktemp("corpora") / "forty.txt"
    path.write_text("\n".join(sentences[:40]), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_config(tiny_model, small_corpus):
    """(output, settings) -> a config that trains in a second: a tiny BERT on forty sentences."""

    def make(output, **changes):
        usual = {
            "encoder": str(tiny_model("bert")),
            "corpus": str(small_corpus),
            "batch_size": 8,
            "steps": 6,
            "learning_rate": 1e-3,
            "max_length": 16,
            "eval_steps": 3,
            "precision": "float32",
        }
        return TrainConfig(**usual | changes, output=str(output))

    return make


@pytest.fixture
def config(tiny_config, tmp_path):
    """Such a config with InfoNCE."""
    return tiny_config(tmp_path / "run", objective="info_nce")


@pytest.fixture
def made(config):
    """Methods -> the encoder, its corpus, what acts, and (step, rows) -> batch: the first eight."""

    def make(*on, **changes):
        changed = replace(config, methods=on, **changes)
        encoder = SentenceEncoder.from_pretrained(changed.encoder, "cls", 0)
        corpus = TokenizedCorpus.load(changed.corpus, encoder, changed.max_length)
        start = Start(changed, encoder, corpus)
        acting = {method.key: method.begin(start) for method in on}

        def batch(step, rows=range(8)):
            return make_batch(changed, corpus, acting, step, np.asarray(rows))

        return encoder, corpus, acting, batch

    return make


@pytest.fixture
def two_processes(monkeypatch):
    """This process as the first of two, as far as it asks."""

    class Two:
        num_processes, process_index, device = 2, 0, torch.device("cpu")

    monkeypatch.setattr(processes, "world", Two)


@pytest.fixture
def own_cache(monkeypatch, tmp_path_factory):
    """A cache folder that no other test has."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def no_sts_data(monkeypatch, tmp_path):
    """No SentEval folder named, and a hub cache that is empty whatever this user has."""
    monkeypatch.delenv("FCSE_SENTEVAL", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def senteval():
    """The SentEval folder that the environment names."""
    folder = os.environ.get("FCSE_SENTEVAL")
    if not folder:
        pytest.skip("FCSE_SENTEVAL is not set: no STS data to score on")
    return folder
