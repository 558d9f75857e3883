"""The levers that make a step cheaper compute the same thing as the library does without them."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import AutoModel

from fcse.encoder import SentenceEncoder, speed


def draw(p, elements=2**22, seed=0):
    torch.manual_seed(seed)
    return speed.cheap_dropout(torch.ones(elements), p)


def five_sigma(p, draws):
    return 5 * math.sqrt(p * (1 - p) / draws)


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_dropout_keeps_the_expected_share_and_scale(p):
    out = draw(p)
    dropped = (out == 0).float().mean().item()
    assert dropped == pytest.approx(p, abs=five_sigma(p, out.numel()) + 2**-16)
    kept = out[out != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-4, atol=0)
    assert out.double().mean().item() == pytest.approx(
        1, abs=five_sigma(p, out.numel()) / (1 - p) + 1e-6
    )


def test_each_of_the_four_lanes_of_a_draw_is_unbiased():
    p = 0.1
    lanes = draw(p).view(-1, 4) == 0
    for share in lanes.float().mean(dim=0).tolist():
        assert share == pytest.approx(p, abs=five_sigma(p, len(lanes)) + 2**-16)


def test_neighbouring_elements_are_dropped_independently():
    p = 0.3
    lanes = draw(p).view(-1, 4) == 0
    for first in range(4):
        for second in range(first):
            both = (lanes[:, first] & lanes[:, second]).float().mean().item()
            assert both == pytest.approx(p * p, abs=five_sigma(p * p, len(lanes)) + 2**-15)


@pytest.mark.parametrize("shape", [(1,), (3,), (3, 7), (2, 3, 5), (4, 4)])
def test_any_shape_is_zeroed_or_scaled(shape):
    torch.manual_seed(1)
    x = torch.randn(shape)
    out = speed.cheap_dropout(x, 0.25)
    assert out.shape == x.shape
    assert (out.eq(0) | out.sub(x / 0.75).abs().lt(1e-6)).all()


def test_no_dropout_at_zero():
    x = torch.randn(33)
    assert torch.equal(speed.cheap_dropout(x, 0.0), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_is_mask_times_scale(dtype):
    torch.manual_seed(2)
    x = torch.randn(64, 33).to(dtype).requires_grad_()
    out = speed.cheap_dropout(x, 0.2)
    assert out.dtype == dtype
    out.backward(torch.ones_like(out))
    scale = torch.tensor(1 / 0.8).to(dtype)
    expected = torch.where(out == 0, torch.zeros_like(scale), scale)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=0)


def test_masks_follow_the_seed():
    assert torch.equal(draw(0.1, 1000, seed=3), draw(0.1, 1000, seed=3))
    assert not torch.equal(draw(0.1, 1000, seed=3), draw(0.1, 1000, seed=4))


def dropout_layers(model):
    return [type(m) for m in model.modules() if isinstance(m, nn.Dropout)]


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "mpnet", "modernbert"])
@pytest.mark.parametrize("fails", [False, True])
def test_layers_and_attention_are_restored(architecture, fails, tiny_model):
    model = AutoModel.from_pretrained(tiny_model(architecture))
    layers, attention = dropout_layers(model), model.config._attn_implementation
    assert set(layers) == {nn.Dropout}
    try:
        with speed.cheap_dropout_in(model):
            assert nn.Dropout not in dropout_layers(model)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert dropout_layers(model) == layers
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "mpnet", "modernbert"])
@torch.no_grad()
def test_evaluation_is_unchanged(architecture, tiny_model, sentences):
    encoder = SentenceEncoder.from_pretrained(tiny_model(architecture), "mean")
    token_ids = encoder.tokenize(["Yes.", *sentences[:6]])
    plain = encoder(token_ids)
    with speed.cheap_dropout_in(encoder.backbone):
        cheap = encoder(token_ids)
    torch.testing.assert_close(cheap, plain, rtol=0, atol=1e-5)
    again = encoder(token_ids)
    assert torch.equal(again[0], plain[0])


@torch.no_grad()
def test_attention_weights_are_dropped_as_the_library_does(tiny_model, sentences):
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"))
    attention = encoder.backbone.encoder.layer[0].attention.self
    for layer in encoder.backbone.modules():
        if type(layer) is nn.Dropout:
            layer.p = 0.0  # attention is then the only source of chance in the first layer
    seen = []
    attention.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    ids = torch.tensor(encoder.tokenize([sentences[0]], 12))
    encoder.backbone(input_ids=ids)
    encoder.backbone.train()
    attention.dropout.p = 0.1
    # Four thousand draws of one sentence side by side.
    torch.manual_seed(0)
    encoder.backbone(input_ids=ids.expand(4096, -1))
    with speed.cheap_dropout_in(encoder.backbone):
        encoder.backbone(input_ids=ids.expand(4096, -1))
    still, library, cheap = seen
    noise = library.std(dim=0)
    assert noise.min() > 0
    error = 6 * noise / 4096**0.5
    assert ((library.mean(dim=0) - still[0]).abs() < error).all()
    assert ((cheap.mean(dim=0) - still[0]).abs() < error).all()
    assert (cheap.std(dim=0) / noise).mean().item() == pytest.approx(1, abs=0.02)


@torch.no_grad()
def test_training_mode_draws_masks(tiny_model, sentences):
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert")).train()
    token_ids = encoder.tokenize(sentences[:4])
    with speed.cheap_dropout_in(encoder.backbone):
        u, v = encoder(token_ids)
    assert (u - v).abs().amax(dim=1).min() > 1e-4


def hooks(model):
    return [
        (name, len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
@torch.no_grad()
def test_first_token_alone_is_the_same_first_token(architecture, tiny_model, sentences):
    encoder = SentenceEncoder.from_pretrained(tiny_model(architecture))
    model = encoder.backbone
    batch = encoder.tokenizer(sentences[:6], padding=True, truncation=True, max_length=48)
    features = {k: torch.tensor(batch[k]) for k in ("input_ids", "attention_mask")}
    before, plain = hooks(model), model(**features).last_hidden_state
    with speed.first_token_only(model):
        first = model(**features).last_hidden_state
    assert first.shape == (6, 1, encoder.dimension)
    torch.testing.assert_close(first, plain[:, :1], rtol=0, atol=1e-6)
    assert hooks(model) == before
    assert model(**features).last_hidden_state.shape == plain.shape


@pytest.mark.parametrize("architecture", ["distilbert", "mpnet", "modernbert"])
@torch.no_grad()
def test_other_architectures_keep_every_token(architecture, tiny_model):
    model = AutoModel.from_pretrained(tiny_model(architecture))
    with speed.first_token_only(model):
        assert model(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state.shape[1] == 3


def test_no_hook_stays_behind_an_error(tiny_model):
    model = AutoModel.from_pretrained(tiny_model("bert"))
    before = hooks(model)
    with pytest.raises(KeyboardInterrupt), speed.first_token_only(model):
        raise KeyboardInterrupt
    assert hooks(model) == before


def test_the_gradient_through_the_first_token_is_the_same(tiny_model, sentences):
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"))
    ids = torch.tensor(encoder.tokenize([sentences[0]], 16))
    # Not the norm: behind a layer norm it hardly changes, and its gradient is rounding.
    direction = torch.randn(encoder.dimension)

    def gradients():
        encoder.zero_grad()
        (encoder.backbone(input_ids=ids).last_hidden_state[:, 0] @ direction).sum().backward()
        return {n: p.grad for n, p in encoder.backbone.named_parameters() if p.grad is not None}

    plain = gradients()
    with speed.first_token_only(encoder.backbone):
        cheap = gradients()
    assert plain.keys() == cheap.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(cheap[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 16])
def test_groups_cover_every_row_once(count, minilm, sentences):
    token_ids = minilm.tokenize(sentences[:count], 32)
    table = minilm.backbone.get_input_embeddings()
    seen = []
    for rows, features in speed.length_groups(token_ids, table, torch.device("cpu")):
        seen += rows
        longest = max(len(token_ids[row]) for row in rows)
        assert features["inputs_embeds"].shape == (len(rows), longest, minilm.dimension)
        assert features["attention_mask"].shape == (len(rows), longest)
        for row, vectors, mask in zip(rows, *features.values(), strict=True):
            length = len(token_ids[row])
            assert mask.tolist() == [1] * length + [0] * (longest - length)
            assert torch.equal(vectors[:length], table(torch.tensor(token_ids[row])))
    assert sorted(seen) == list(range(count))


def test_groups_hold_sentences_of_similar_length(minilm, sentences):
    token_ids = minilm.tokenize(sentences[:32])
    table = minilm.backbone.get_input_embeddings()
    groups = [
        [len(token_ids[row]) for row in rows]
        for rows, _ in speed.length_groups(token_ids, table, torch.device("cpu"))
    ]
    assert len(groups) == speed.LENGTH_GROUPS
    for shorter, longer in pairwise(groups):
        assert max(shorter) <= min(longer)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_views_in_groups_equal_one_padded_pass(pooling, sentences):
    encoder = SentenceEncoder.from_pretrained("minilm", pooling)
    texts = ["Yes.", *sentences[:10], sentences[3]]
    batch = encoder.tokenizer(texts, padding=True, return_tensors="pt")
    hidden = encoder.backbone(**batch).last_hidden_state
    if pooling == "cls":
        expected = encoder.head(hidden[:, 0])
    else:
        mask = batch["attention_mask"].unsqueeze(-1)
        expected = (hidden * mask).sum(1) / mask.sum(1)
    u, v = encoder(encoder.tokenize(texts))
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(v, expected, rtol=0, atol=1e-5)


def test_word_embeddings_get_the_gradient_of_one_padded_pass(tiny_model, sentences):
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"))
    texts = ["Yes.", *sentences[:6]]
    table = encoder.backbone.get_input_embeddings().weight
    u, v = encoder(encoder.tokenize(texts))
    (grouped,) = torch.autograd.grad((u * v).sum(), table)
    batch = encoder.tokenizer(
        texts, padding=True, truncation=True, max_length=encoder.max_length, return_tensors="pt"
    )
    features = {k: batch[k] for k in ("input_ids", "attention_mask")}
    x = encoder.head(encoder.backbone(**features).last_hidden_state[:, 0])
    (plain,) = torch.autograd.grad(x.square().sum(), table)
    # The library gives the padding's row no gradient; nothing of it is read here either.
    torch.testing.assert_close(grouped, plain, rtol=1e-3, atol=1e-5)
