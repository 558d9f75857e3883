"""A masked language model made here: an encoder with a head over its own words, trained briefly.

For what needs one where none is at hand: trained once for an encoder and a corpus, and kept."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoModelForMaskedLM

from fcse.data import cache_folder, versions
from fcse.encoder.detection import MASK_SHARE, MaskedLM, Unigrams, mask
from fcse.encoder.precision import resolve_precision
from fcse.encoder.sentence_encoder import SentenceEncoder, weights_hash
from fcse.errors import InputError, replacing, writing

STEPS, BATCH_SIZE, LEARNING_RATE = 200, 64, 5e-4
"""Of its training where nothing else is said: AdamW, a tenth of the steps to warm up, then linear
decay to 0."""

_HELD_OUT = 256
"""Sentences that it is not trained on, at most a tenth of the corpus: its accuracy is theirs."""

_ACCURACY = "accuracy.json"


def trained_masked_lm(
    encoder: SentenceEncoder, corpus: Any, steps: int = STEPS
) -> tuple[MaskedLM, dict[str, float]]:
    """The masked language model of an encoder and a `TokenizedCorpus`, trained if it is not kept.

    The encoder is not changed: its backbone is copied. The head shares its weights with the word
    embeddings. Processes that want it at once wait for the first one.

    steps: of its training, >= 1.

    Returns: The model, and the share of masked tokens of held-out sentences that it recovers, under
    "model", beside that of draws of unigrams, under "unigrams". InputError: an encoder without a
    mask token or without a head of this kind, or a cache that cannot be written."""
    decides = [corpus.key, weights_hash(encoder.backbone), steps, BATCH_SIZE, LEARNING_RATE]
    decides += [MASK_SHARE, resolve_precision("auto", encoder.device), versions()]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]
    path = cache_folder() / f"masked-lm-{digest}"
    with writing(path.parent, "name another folder with XDG_CACHE_HOME, or make room"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_dir():
                with replacing(path) as partial:
                    _make(encoder, corpus, steps, partial)
    return MaskedLM(path, encoder.tokenizer), json.loads((path / _ACCURACY).read_text())


def _make(encoder: SentenceEncoder, corpus: Any, steps: int, path: Path) -> None:
    tokenizer = encoder.tokenizer
    if tokenizer.mask_token_id is None:
        raise InputError(
            f"the tokenizer of this encoder ({encoder.backbone.config.model_type}) has no mask "
            "token: give an encoder that was trained as a masked language model"
        )
    rows = np.random.default_rng(0).permutation(len(corpus))
    count = min(_HELD_OUT, len(corpus) // 10)
    held_out, known = rows[:count], rows[count:]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _with_head(encoder).to(encoder.device)
        _train(model, encoder, corpus, known, steps)
        model.eval()
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
        accuracy = _accuracy(path, encoder, corpus, held_out, known)
    (path / _ACCURACY).write_text(json.dumps(accuracy))


def _with_head(encoder: SentenceEncoder) -> Any:
    try:
        model = AutoModelForMaskedLM.from_config(encoder.backbone.config)
        model.base_model.load_state_dict(encoder.backbone.state_dict())
    except (ValueError, RuntimeError, AttributeError):
        kind = encoder.backbone.config.model_type
        raise InputError(
            f"this encoder ({kind}) has no masked language model: name one as diffcse.generator, "
            "or unigrams"
        ) from None
    model.tie_weights()
    return model


def _train(
    model: Any, encoder: SentenceEncoder, corpus: Any, known: np.ndarray, steps: int
) -> None:
    size = min(BATCH_SIZE, len(known))
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    low = resolve_precision("auto", encoder.device) == "bf16"
    generator = np.random.default_rng(1)
    model.train()
    for step in tqdm(range(steps), "masked language model", unit="step", leave=False):
        ids, chosen, masked = _masked(encoder, corpus, generator.choice(known, size, replace=False))
        if not chosen.any():
            continue
        warm, decay = (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(warm, decay)
        with torch.autocast(encoder.device.type, torch.bfloat16, enabled=low):
            scores = _scores(model, masked, masked != encoder.tokenizer.pad_token_id, chosen)
        optimizer.zero_grad()
        nn.functional.cross_entropy(scores.float(), ids[chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def _masked(
    encoder: SentenceEncoder, corpus: Any, rows: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Padded ids of rows of the corpus, which were chosen, and what they became."""
    tokenizer, device = encoder.tokenizer, encoder.device
    lines = [torch.tensor(ids) for ids in corpus.batch(rows)[1]]
    ids = pad_sequence(lines, batch_first=True, padding_value=tokenizer.pad_token_id)
    special, mask_id = tokenizer.all_special_ids, tokenizer.mask_token_id
    masked, chosen = mask(ids, MASK_SHARE, special, mask_id, len(tokenizer))
    return ids.to(device), chosen.to(device), masked.to(device)


def _scores(model: Any, ids: Tensor, attended: Tensor, chosen: Tensor) -> Tensor:
    """Scores of the words at the chosen positions: all others would cost as much, for nothing."""
    head = getattr(model, "cls", None) or getattr(model, "lm_head", None)
    if head is None:
        return model(input_ids=ids, attention_mask=attended.long()).logits[chosen]
    hidden = model.base_model(input_ids=ids, attention_mask=attended.long()).last_hidden_state
    return head(hidden[chosen])


def _accuracy(
    path: Path, encoder: SentenceEncoder, corpus: Any, held_out: np.ndarray, known: np.ndarray
) -> dict[str, float]:
    """The share of masked tokens that are recovered, by the model and by draws of unigrams."""
    if not len(held_out):
        return {"model": 0.0, "unigrams": 0.0}
    model = MaskedLM(path, encoder.tokenizer)
    unigrams = Unigrams(corpus.batch(known)[1], encoder.tokenizer.all_special_ids)
    ids, _, masked = _masked(encoder, corpus, held_out)
    at = masked == encoder.tokenizer.mask_token_id
    return {
        name: float((filled(masked, at)[at] == ids[at]).double().mean())
        for name, filled in (("model", model), ("unigrams", unigrams))
    }
