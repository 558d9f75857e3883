"""Conditional replaced-token detection: masks, generators, the discriminator and its loss."""

import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import CONFIGS, make_tokenizer, one_line_refusal, save_tiny_model
from transformers import AlbertConfig, AutoModelForMaskedLM

from fcse.encoder import SentenceEncoder
from fcse.encoder.detection import MASK_SHARE, Detection, MaskedLM, Unigrams, mask


@pytest.fixture(scope="module")
def texts(sentences):
    """Real sentences of unlike lengths, one without a token of its own, one beyond the limit."""
    return ["", "Yes.", *sentences[:9], " ".join(sentences[:20])]


@pytest.fixture
def encoder(tiny_model, request):
    """A fresh encoder of one architecture, BERT unless a test asks for another."""
    return SentenceEncoder.from_pretrained(tiny_model(getattr(request, "param", "bert")))


every_architecture = pytest.mark.parametrize("encoder", CONFIGS, indirect=True)


def unigrams(encoder, texts):
    return Unigrams(encoder.tokenize(texts), encoder.tokenizer.all_special_ids)


def detection_of(encoder, texts, **arguments):
    return Detection(encoder, unigrams(encoder, texts), **arguments).eval()


def embed(encoder, texts):
    return torch.from_numpy(encoder.encode(texts))


def padded(encoder, texts):
    batch = {"input_ids": encoder.tokenize(texts)}
    return encoder.tokenizer.pad(batch, return_tensors="pt")["input_ids"]


def masked(encoder, ids, share, seed):
    tokenizer = encoder.tokenizer
    torch.manual_seed(seed)
    return mask(ids, share, tokenizer.all_special_ids, tokenizer.mask_token_id, len(tokenizer))


@pytest.mark.parametrize("share", [0.01, 0.15, MASK_SHARE, 0.5, 1.0])
@every_architecture
def test_chosen_tokens_are_masked_and_none_of_the_special(encoder, texts, share):
    ids = padded(encoder, texts)
    changed, chosen = masked(encoder, ids, share, seed=1)
    special = torch.tensor(encoder.tokenizer.all_special_ids)
    assert not (chosen & torch.isin(ids, special)).any()
    assert torch.equal(changed[~chosen], ids[~chosen])
    if share == 1:
        assert chosen.sum() == (~torch.isin(ids, special)).sum()


def test_of_the_chosen_most_become_the_mask_and_some_any_token(encoder, sentences):
    row = padded(encoder, sentences[:1])
    draws = 2000
    changed, chosen = masked(encoder, row.expand(draws, -1), 1.0, seed=3)
    before, after = row.expand(draws, -1)[chosen], changed[chosen]
    n = len(after)
    for p, found in (
        (0.8, after == encoder.tokenizer.mask_token_id),
        (0.1, after == before),
        (0.1, (after != before) & (after != encoder.tokenizer.mask_token_id)),
    ):
        # One in a vocabulary of hundreds is drawn for itself, or is the mask.
        assert abs(found.double().mean() - p) < 5 * math.sqrt(p * (1 - p) / n) + 1e-3
    assert len(after.unique()) > 0.9 * len(encoder.tokenizer)


def test_masks_follow_the_seed_alone(encoder, texts):
    ids = padded(encoder, texts)
    first, again, other = (masked(encoder, ids, 0.3, seed)[1] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_token_is_as_likely_to_be_masked(encoder, sentences):
    row = padded(encoder, sentences[:1])
    draws = 4000
    _, which = masked(encoder, row.expand(draws, -1), MASK_SHARE, seed=3)
    special = torch.tensor(encoder.tokenizer.all_special_ids)
    maskable = ~torch.isin(row[0], special)
    p = MASK_SHARE
    frequencies = which.double().mean(0)[maskable]
    assert len(frequencies) > 10
    assert (frequencies - p).abs().max() < 5 * math.sqrt(p * (1 - p) / draws)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01, math.nan])
def test_a_share_out_of_range_is_refused(encoder, texts, share):
    with pytest.raises(ValueError, match="share must lie"):
        masked(encoder, padded(encoder, texts), share, seed=0)


def test_unigrams_have_the_frequencies_of_the_corpus(encoder, sentences):
    token_ids = encoder.tokenize(sentences[:30])
    special = encoder.tokenizer.all_special_ids
    flat = np.array([token for ids in token_ids for token in ids if token not in special])
    counts = np.bincount(flat)
    draw = Unigrams(token_ids, special)
    torch.manual_seed(7)
    where = torch.ones(400, 500, dtype=torch.bool)
    drawn = np.bincount(draw(torch.zeros(400, 500, dtype=torch.int64), where).flatten().numpy())
    np.testing.assert_array_equal(drawn > 0, counts[: len(drawn)] > 0)
    assert len(drawn) == len(counts)
    there = counts > 0
    expected = where.sum().item() * counts[there] / counts.sum()
    chi_square = ((drawn[there] - expected) ** 2 / expected).sum()
    freedom = there.sum() - 1
    assert abs(chi_square - freedom) < 6 * math.sqrt(2 * freedom)


def test_unigrams_are_as_many_as_are_masked_and_follow_the_seed(encoder, texts):
    ids = padded(encoder, texts)
    changed, which = masked(encoder, ids, 0.3, seed=1)
    draw = unigrams(encoder, texts)

    def drawn(seed):
        torch.manual_seed(seed)
        return draw(changed, which)

    assert torch.equal(drawn(1)[~which], changed[~which])
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_a_corpus_of_nothing_is_refused(encoder):
    with one_line_refusal("no token to draw"):
        unigrams(encoder, ["", " "])


@pytest.fixture(scope="module")
def masked_lm_folder(tmp_path_factory, tiny_model):
    """Architecture -> folder of a tiny masked language model with the encoder's tokenizer."""
    made = {}

    def folder(architecture, **changes):
        key = (architecture, *changes.items())
        if key not in made:
            tokenizer = SentenceEncoder.from_pretrained(tiny_model(architecture)).tokenizer
            config = CONFIGS[architecture](len(tokenizer))
            config.update(changes)
            with torch.random.fork_rng():
                torch.manual_seed(1)
                model = AutoModelForMaskedLM.from_config(config)
            made[key] = tmp_path_factory.mktemp("generators") / architecture
            model.save_pretrained(made[key])
            tokenizer.save_pretrained(made[key])
        return made[key]

    return folder


@every_architecture
@torch.no_grad()
def test_a_masked_lm_gives_its_own_argmax(encoder, texts, masked_lm_folder):
    folder = masked_lm_folder(encoder.backbone.config.model_type)
    fill = MaskedLM(folder, encoder.tokenizer)
    model = AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids, which = masked(encoder, padded(encoder, texts), MASK_SHARE, seed=1)
    filled = fill(ids, which)
    attention_mask = (ids != encoder.tokenizer.pad_token_id).long()
    direct = model(input_ids=ids, attention_mask=attention_mask).logits
    assert torch.equal(filled, direct.argmax(-1))
    # The same without padding, up to a rounding that could decide between equal scores.
    for row, mine, real in zip(ids, filled, attention_mask.bool(), strict=True):
        alone = model(input_ids=row[real][None]).logits[0]
        chosen = alone.gather(1, mine[real][:, None])[:, 0]
        torch.testing.assert_close(chosen, alone.amax(1), rtol=0, atol=1e-4)


def test_a_masked_lm_is_frozen_and_no_part_of_the_module(encoder, masked_lm_folder):
    fill = MaskedLM(masked_lm_folder("bert"), encoder.tokenizer)
    detection = Detection(encoder, fill).train()
    assert not any(module.training for module in fill.model.modules())
    assert not any(p.requires_grad for p in fill.model.parameters())
    theirs = {id(p) for p in fill.model.parameters()}
    assert not any(id(p) in theirs for p in detection.parameters())
    assert all(name.startswith(("discriminator.", "head.")) for name in detection.state_dict())


def test_columns_that_stand_for_no_token_are_never_given(encoder, texts, masked_lm_folder):
    tokens = len(encoder.tokenizer)
    fill = MaskedLM(masked_lm_folder("bert", vocab_size=tokens + 40), encoder.tokenizer)
    with torch.no_grad():
        fill.model.cls.predictions.bias[tokens:] = 1e4
    ids, which = masked(encoder, padded(encoder, texts), MASK_SHARE, seed=1)
    assert fill(ids, which).max() < tokens


def test_another_vocabulary_is_refused(encoder, masked_lm_folder):
    with one_line_refusal("roberta.* has another vocabulary than the encoder"):
        MaskedLM(masked_lm_folder("roberta"), encoder.tokenizer)


def test_a_vocabulary_of_the_same_size_with_other_tokens_is_refused(
    encoder, sentences, masked_lm_folder, tmp_path
):
    other = make_tokenizer(sentences[200:])
    assert len(other) == len(encoder.tokenizer)
    folder = shutil.copytree(masked_lm_folder("bert"), tmp_path / "other")
    other.save_pretrained(folder)
    with one_line_refusal("another vocabulary"):
        MaskedLM(folder, encoder.tokenizer)


def test_a_model_smaller_than_its_tokenizer_is_refused(encoder, masked_lm_folder):
    with one_line_refusal("another vocabulary"):
        MaskedLM(masked_lm_folder("bert", vocab_size=50), encoder.tokenizer)


@pytest.mark.parametrize("name", ["no-such-model", "nobody/no-such-model", "./no/such/folder"])
def test_a_name_that_is_nowhere_is_refused(name, encoder, no_sts_data):
    with one_line_refusal(f"masked language model '{name}' could not be loaded"):
        MaskedLM(name, encoder.tokenizer)


def test_a_folder_without_weights_is_refused(encoder, masked_lm_folder, tmp_path):
    folder = shutil.copytree(masked_lm_folder("bert"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with one_line_refusal("could not be loaded"):
        MaskedLM(folder, encoder.tokenizer)


@every_architecture
def test_an_encoder_without_a_language_model_head_is_refused(encoder, tiny_model):
    with one_line_refusal("lacks weights"):
        MaskedLM(tiny_model(encoder.backbone.config.model_type), encoder.tokenizer)


class Code:
    """Unpickled by trust, it would write a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_not_unpickled(encoder, masked_lm_folder, tmp_path):
    folder = shutil.copytree(masked_lm_folder("bert"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"weights": Code(tmp_path / "written")}, folder / "pytorch_model.bin")
    with one_line_refusal("are not unpickled"):
        MaskedLM(folder, encoder.tokenizer)
    assert not (tmp_path / "written").exists()


def test_code_in_the_folder_is_not_run(encoder, masked_lm_folder, tmp_path):
    folder = shutil.copytree(masked_lm_folder("bert"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForMaskedLM": "own.Own"}
    config |= {"model_type": "own", "auto_map": own}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'written')!r})\n")
    with one_line_refusal("could not be loaded"):
        MaskedLM(folder, encoder.tokenizer)
    assert not (tmp_path / "written").exists()


def authors(detection, model, embedding, masked_ids, ids, pad_id):
    """Their `cl_forward`, step by step, from masked ids on: logits, labels and loss."""
    attention = (ids != pad_id).long()
    with torch.no_grad():
        predicted = model(input_ids=masked_ids, attention_mask=attention).logits.argmax(-1)
    predicted[:, 0] = ids[:, 0]
    labels = (predicted != ids) * attention
    inputs = torch.where(attention.bool(), predicted, pad_id)
    backbone = detection.discriminator
    embedded = backbone.embeddings(input_ids=inputs)
    embedded = torch.cat([embedding.unsqueeze(1), embedded[:, 1:]], dim=1)
    wide = torch.zeros_like(attention, dtype=embedded.dtype)[:, None, None]
    wide = wide.masked_fill(~attention.bool()[:, None, None], torch.finfo(embedded.dtype).min)
    hidden = backbone.encoder(embedded, attention_mask=wide.expand(-1, 1, ids.shape[1], -1))[0]
    logits = detection.head(hidden)
    loss = torch.nn.functional.cross_entropy(logits.view(-1, 2), labels.view(-1))
    return logits, labels, loss


@pytest.mark.parametrize("encoder", ["bert", "roberta"], indirect=True)
def test_logits_loss_and_gradients_are_those_of_the_authors_order(encoder, texts, masked_lm_folder):
    folder = masked_lm_folder(encoder.backbone.config.model_type)
    fill = MaskedLM(folder, encoder.tokenizer)
    detection = Detection(encoder, fill).eval().double()
    token_ids, ids = encoder.tokenize(texts), padded(encoder, texts)
    results = []
    for theirs in (False, True):
        embedding = embed(encoder, texts).double().requires_grad_()
        detection.zero_grad()
        if theirs:
            masked_ids, _ = masked(encoder, ids, MASK_SHARE, seed=1)
            pad_id = encoder.tokenizer.pad_token_id
            logits, labels, loss = authors(
                detection, fill.model, embedding, masked_ids, ids, pad_id
            )
            logits = (logits[..., 1] - logits[..., 0]).flatten()
            labels = labels.flatten().bool()
        else:
            torch.manual_seed(1)
            loss, logits, labels = detection(embedding, token_ids)
        loss.backward()
        gradients = {k: p.grad.clone() for k, p in detection.named_parameters()}
        results.append((loss.detach(), logits.detach(), labels, embedding.grad, gradients))
    (loss, logits, labels, slope, gradients), expected = results
    assert torch.equal(labels, expected[2])
    assert labels.any() and not labels.all()
    for mine, theirs in zip((loss, logits, slope), (*expected[:2], expected[3]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[4][name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("generator", ["masked_lm", "unigrams"])
@pytest.mark.parametrize("all_positions", [True, False])
@every_architecture
def test_the_loss_is_the_cross_entropy_of_its_logits(
    encoder, generator, all_positions, texts, masked_lm_folder
):
    if generator == "masked_lm":
        fill = MaskedLM(masked_lm_folder(encoder.backbone.config.model_type), encoder.tokenizer)
    else:
        fill = unigrams(encoder, texts)
    token_ids = encoder.tokenize(texts)
    torch.manual_seed(1)
    detection = Detection(encoder, fill, all_positions=all_positions).eval()
    loss, logits, replaced = detection(embed(encoder, texts), token_ids)
    assert loss.shape == ()
    assert loss.dtype == logits.dtype == torch.float32
    lengths = [len(ids) for ids in token_ids]
    counted = len(lengths) * max(lengths) if all_positions else sum(lengths) - len(lengths)
    assert logits.shape == replaced.shape == (counted,)
    assert replaced.dtype == torch.bool
    assert replaced.any()
    z, y = logits.detach().double().numpy(), replaced.numpy()
    p = 1 / (1 + np.exp(-z))
    expected = -np.where(y, np.log(p), np.log(1 - p)).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("all_positions", [True, False])
def test_labels_say_which_tokens_were_replaced(encoder, all_positions, texts):
    detection = detection_of(encoder, texts, all_positions=all_positions)
    token_ids = encoder.tokenize(texts)

    torch.manual_seed(1)
    edited = detection.edit(token_ids)
    torch.manual_seed(1)
    replaced = detection(embed(encoder, texts), token_ids)[2].tolist()
    longest = max(map(len, token_ids))
    expected = []
    for before, after in zip(token_ids, edited, strict=True):
        assert before[0] == after[0]
        changed = [new != old for new, old in zip(after, before, strict=True)]
        rest = [False] * (longest - len(before))
        expected += [*changed, *rest] if all_positions else changed[1:]
    assert replaced == expected


def test_a_token_replaced_by_itself_counts_as_original(encoder, texts):
    ids = padded(encoder, texts)
    detection = Detection(encoder, lambda *_: ids.clone())
    *_, replaced = detection(embed(encoder, texts), encoder.tokenize(texts))
    assert not replaced.any()


def test_all_but_the_first_are_as_the_generator_says_and_all_lengths_kept(encoder, texts):
    token_ids = encoder.tokenize(texts)
    unknown = encoder.tokenizer.unk_token_id
    edited = Detection(encoder, lambda ids, _: torch.full_like(ids, unknown)).edit(token_ids)
    for before, after in zip(token_ids, edited, strict=True):
        assert after == [before[0], *[unknown] * (len(before) - 1)]
    drawn = detection_of(encoder, texts).edit(token_ids)
    same = [
        a == b for x, y in zip(token_ids, drawn, strict=True) for a, b in zip(x, y, strict=True)
    ]
    assert 0.6 < np.mean(same) < 0.95, "unigrams leave what was not chosen"


@every_architecture
def test_gradients_reach_embedding_and_discriminator_only(encoder, texts, masked_lm_folder):
    fill = MaskedLM(masked_lm_folder(encoder.backbone.config.model_type), encoder.tokenizer)
    detection = Detection(encoder, fill).train()
    embedding = embed(encoder, texts).requires_grad_()
    torch.manual_seed(1)
    detection(embedding, encoder.tokenize(texts))[0].backward()
    assert (embedding.grad.abs().amax(1) > 0).all()
    assert torch.isfinite(embedding.grad).all()
    for name, parameter in detection.named_parameters():
        assert parameter.grad is not None, name
    assert all(p.grad is None for p in fill.model.parameters())
    # The discriminator is a copy: the encoder gets its share through the embedding alone.
    assert all(p.grad is None for p in encoder.parameters())


def test_the_gradient_of_the_embedding_is_the_slope_of_the_loss(encoder, texts):
    detection = detection_of(encoder, texts).double()
    embedding = embed(encoder, texts).double().requires_grad_()
    direction = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(2)).double()

    def loss(shift):
        torch.manual_seed(1)
        return detection(embedding + shift * direction, encoder.tokenize(texts))[0]

    loss(0).backward()
    with torch.no_grad():
        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    torch.testing.assert_close((embedding.grad * direction).sum(), slope, rtol=1e-5, atol=1e-9)


@every_architecture
def test_the_discriminator_starts_as_a_copy_of_the_backbone(encoder, texts):
    detection = detection_of(encoder, texts)
    theirs = dict(encoder.backbone.named_parameters())
    for name, parameter in detection.discriminator.named_parameters():
        assert torch.equal(parameter, theirs.pop(name))
        with torch.no_grad():
            parameter.add_(1)
    assert not theirs
    again = SentenceEncoder.from_pretrained(encoder.backbone.config._name_or_path)
    for mine, fresh in zip(encoder.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, fresh)


def test_a_new_head_follows_its_seed_alone(encoder, texts):
    first, again, other = (detection_of(encoder, texts, seed=s).head.weight for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@every_architecture
@torch.no_grad()
def test_the_first_position_is_the_sentence_embedding(encoder, texts):
    encoder.double()  # fine enough that no change, however small, is rounded away
    detection = detection_of(encoder, texts).double()
    token_ids = encoder.tokenize(texts)
    embedding = embed(encoder, texts).double()
    logits = detection.logits(embedding, token_ids)
    other_first = [[encoder.tokenizer.unk_token_id, *ids[1:]] for ids in token_ids]
    assert torch.equal(detection.logits(embedding, other_first), logits)

    moved = embedding.clone()
    moved[4] = torch.randn(encoder.dimension, generator=torch.Generator().manual_seed(1))
    changes = (detection.logits(moved, token_ids) - logits).abs()
    for row, (change, ids) in enumerate(zip(changes, token_ids, strict=True)):
        change = change[: len(ids)]
        assert (change > 0).all() if row == 4 else (change == 0).all()

    # Fed with what it replaces, the discriminator is the backbone and the head, token by token.
    for ids in token_ids:
        seen = []
        keep = encoder.backbone.embeddings.register_forward_hook(lambda *x, s=seen: s.append(x[2]))
        hidden = encoder.backbone(input_ids=torch.tensor([ids])).last_hidden_state
        keep.remove()
        mine = detection.logits(seen[0][:, 0], [ids])
        torch.testing.assert_close(mine, detection.head(hidden), rtol=0, atol=1e-5)


@every_architecture
@torch.no_grad()
def test_padding_does_not_change_the_logits_of_tokens(encoder, texts):
    token_ids = encoder.tokenize(texts)
    embedding = embed(encoder, texts)
    for all_positions in (True, False):
        detection = detection_of(encoder, texts, all_positions=all_positions)
        together = detection.logits(embedding, token_ids)
        for vector, ids, line in zip(embedding, token_ids, together, strict=True):
            alone = detection.logits(vector[None], [ids])[0]
            torch.testing.assert_close(line[: len(ids)], alone, rtol=0, atol=1e-4)


def test_a_restored_generator_gives_the_same_step(encoder, texts):
    detection = detection_of(encoder, texts).train()
    token_ids, embedding = encoder.tokenize(texts), embed(encoder, texts)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    loss, logits, replaced = detection(embedding, token_ids)
    other = detection(embedding, token_ids)
    torch.set_rng_state(state)
    again = detection(embedding, token_ids)
    assert torch.equal(loss, again[0])
    assert torch.equal(logits, again[1])
    assert torch.equal(replaced, again[2])
    assert not torch.equal(replaced, other[2])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32)],
)
def test_dtype_follows_the_module(encoder, texts, dtype, expected):
    detection = detection_of(encoder, texts).to(dtype)
    embedding = embed(encoder, texts).requires_grad_()
    loss, logits, _ = detection(embedding, encoder.tokenize(texts))
    assert loss.dtype == logits.dtype == expected
    loss.backward()
    assert embedding.grad.dtype == torch.float32


def test_autocast_leaves_the_loss_in_float32(encoder, texts):
    detection = detection_of(encoder, texts)
    token_ids, embedding = encoder.tokenize(texts), embed(encoder, texts)
    torch.manual_seed(1)
    plain = detection(embedding, token_ids)[0]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = detection(embedding.bfloat16(), token_ids)[0]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=0.1, atol=0)


# BERT's tiny weights are drawn so wide that it can sit still for as many steps.
@pytest.mark.parametrize("encoder", ["mpnet", "modernbert"], indirect=True)
def test_it_learns(encoder, texts):
    detection = detection_of(encoder, texts)
    token_ids, embedding = encoder.tokenize(texts, 24), embed(encoder, texts)
    optimizer = torch.optim.Adam(detection.parameters(), 3e-3)
    for _ in range(40):
        torch.manual_seed(1)
        loss, _, replaced = detection(embedding, token_ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    share = replaced.double().mean().item()
    without_looking = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert loss.item() < without_looking / 2


@pytest.mark.parametrize("shape", [(3, 32), (12, 31), (12, 1, 32)])
def test_embeddings_of_another_shape_are_refused(encoder, texts, shape):
    detection = detection_of(encoder, texts)
    with pytest.raises(ValueError, match=r"sentence_embedding must be \(12, 32\)"):
        detection(torch.zeros(shape), encoder.tokenize(texts))


def test_a_tokenizer_without_a_mask_token_is_refused(encoder, texts):
    encoder.tokenizer.mask_token = None
    with one_line_refusal("has no mask token"):
        detection_of(encoder, texts)


def test_narrow_input_vectors_are_refused(encoder, texts, tmp_path):
    config = AlbertConfig(
        vocab_size=len(encoder.tokenizer),
        embedding_size=16,
        hidden_size=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        intermediate_size=64,
    )
    folder = save_tiny_model(config, encoder.tokenizer, tmp_path)
    with one_line_refusal("input vectors of 16 numbers"):
        detection_of(SentenceEncoder.from_pretrained(folder), texts)
