"""Sentences end to end compute what one padded pass through the library does."""

import pytest
import torch
from torch import nn

from fcse.encoder import SentenceEncoder, speed
from fcse.encoder.packing import Packing, packs

LENGTHS = [5, 12, 3, 8, 8, 2]


def padded(encoder, token_ids):
    """The library's own pass: (n, m, D) of each layer, and the mask."""
    batch = encoder.tokenizer.pad({"input_ids": token_ids}, return_tensors="pt")
    features = {k: batch[k] for k in ("input_ids", "attention_mask")}
    return encoder.backbone(**features, output_hidden_states=True), batch["attention_mask"]


def read(states, mask, pooling):
    if pooling == "cls":
        return states[:, 0]
    return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


@pytest.mark.parametrize("lengths", [LENGTHS, [2], [30] * 9, [3] * 40, list(range(2, 64))])
def test_the_grid_holds_each_sentence_and_the_line_takes_it_back(lengths):
    heads, width = 4, 3
    packing = Packing(lengths, heads)
    line = torch.zeros(1, heads, packing.length, width)
    line[:, :, : sum(lengths)] = torch.randn(1, heads, sum(lengths), width)
    grid = packing.grid(line)
    assert grid.shape[:2] == (len(lengths), heads)
    assert grid.shape[2] % 8 == 0
    for row, (start, count) in enumerate(zip(packing.first.tolist(), lengths, strict=True)):
        assert torch.equal(grid[row, :, :count], line[0, :, start : start + count])
        assert packing.positions[0, start : start + count].tolist() == list(range(count))
        bias = packing.bias[row, 0, 0]
        assert (bias[:count] == 0).all()
        assert (bias[count:] < -1000).all()
    assert torch.equal(packing.line(grid), line.transpose(1, 2))


@pytest.mark.parametrize("lengths", [LENGTHS, [2], [7] * 3])
def test_the_gradients_of_grid_and_line(lengths):
    packing = Packing(lengths, 2)
    tokens = sum(lengths)
    line = torch.randn(1, 2, packing.length, 3, dtype=torch.float64, requires_grad=True)
    inside = packing.bias == 0

    def there_and_back(line):
        # What stands behind a sentence's end gets no gradient, as in attention.
        return packing.line(packing.grid(line) * inside.transpose(2, 3))[:, :tokens]

    assert torch.autograd.gradcheck(there_and_back, line)


def test_the_line_has_few_lengths():
    made = {Packing([20 + i % 9] * 128, 2).length for i in range(9)}
    assert all(length % 128 == 0 for length in made)
    for tokens in (100, 1000, 3000, 20_000):
        assert Packing([10] * (tokens // 10), 1).length <= 1.07 * tokens


@pytest.mark.parametrize("pooling", ["cls", "mean", "mean_first_last", "mean_top2"])
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
@torch.no_grad()
def test_views_are_those_of_a_padded_pass(architecture, pooling, tiny_model, sentences):
    encoder = SentenceEncoder.from_pretrained(tiny_model(architecture), pooling)
    token_ids = encoder.tokenize(["Yes.", *sentences[:9]])
    assert packs(encoder.backbone, token_ids)
    output, mask = padded(encoder, token_ids)
    states = output.last_hidden_state
    if pooling == "mean_first_last":
        states = (states + output.hidden_states[1]) / 2
    if pooling == "mean_top2":
        states = (states + output.hidden_states[-2]) / 2
    expected = read(states, mask, pooling)
    expected = encoder.head(expected) if pooling == "cls" else expected
    for view in encoder(token_ids):
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@torch.no_grad()
def test_layers_below_and_further_sentences_come_along(pooling, tiny_model, sentences):
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"), pooling)
    token_ids, others = (encoder.tokenize(part) for part in (sentences[:5], sentences[5:10]))
    head = encoder.head if pooling == "cls" else nn.Identity()
    output, mask = padded(encoder, token_ids)
    below = head(read(output.hidden_states[-2], mask, pooling))
    u, v, lower, further = encoder(token_ids, layers=1, further=[others])
    assert torch.equal(u, v)
    torch.testing.assert_close(lower, torch.stack([below] * 2, dim=1), rtol=0, atol=1e-5)
    torch.testing.assert_close(further, encoder(others)[0], rtol=0, atol=1e-5)
    second = encoder(token_ids, others)
    torch.testing.assert_close(second[0], u, rtol=0, atol=1e-5)
    torch.testing.assert_close(second[1], further, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_every_gradient_is_that_of_a_padded_pass(architecture, pooling, tiny_model, sentences):
    encoder = SentenceEncoder.from_pretrained(tiny_model(architecture), pooling).double()
    token_ids = encoder.tokenize(["Yes.", *sentences[:6]])
    direction = torch.randn(7, encoder.dimension, dtype=torch.float64)

    def gradients(views):
        encoder.zero_grad()
        (views * direction).sum().backward()
        named = encoder.backbone.named_parameters()
        return {name: x.grad for name, x in named if x.grad is not None}

    output, mask = padded(encoder, token_ids)
    plain = read(output.last_hidden_state, mask, pooling)
    plain = gradients(encoder.head(plain) if pooling == "cls" else plain)
    ours = gradients(encoder(token_ids)[0])
    assert ours.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-10)


@torch.no_grad()
def test_long_sentences_and_other_architectures_go_in_groups(tiny_model, minilm, sentences):
    short, long = minilm.tokenize(["Yes."]), minilm.tokenize([" ".join(sentences[:9])])
    assert packs(minilm.backbone, short)
    assert not packs(minilm.backbone, short + long)
    both = minilm(short + long)[0]
    alone = torch.cat([minilm(short)[0], minilm(long)[0]])
    torch.testing.assert_close(both, alone, rtol=0, atol=1e-5)
    for architecture in ("distilbert", "mpnet", "modernbert"):
        encoder = SentenceEncoder.from_pretrained(tiny_model(architecture))
        assert not packs(encoder.backbone, encoder.tokenize(["Yes."]))


@torch.no_grad()
def test_attention_weights_are_dropped_as_the_library_does(tiny_model, sentences):
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"))
    attention = encoder.backbone.encoder.layer[0].attention.self
    for layer in encoder.backbone.modules():
        if type(layer) is nn.Dropout:
            layer.p = 0.0  # attention is then the only source of chance in the first layer
    seen = []
    attention.register_forward_hook(lambda _, __, output: seen.append(output[0]))
    ids = encoder.tokenize([sentences[0]], 12)
    encoder.train()
    attention.dropout.p = 0.1
    torch.manual_seed(0)
    encoder.backbone(input_ids=torch.tensor(ids).expand(4096, -1))
    encoder(ids * 2048)
    library, line = seen
    line = line[0, : 4096 * len(ids[0])].view(library.shape)
    error = 6 * library.std(dim=0) * (2 / 4096) ** 0.5
    assert ((line.mean(dim=0) - library.mean(dim=0)).abs() < error).all()
    assert (line.std(dim=0) / library.std(dim=0)).mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "mpnet", "modernbert"])
def test_in_bf16_float32_weights_get_nearly_the_same_gradients(architecture, tiny_model, sentences):
    encoder = SentenceEncoder.from_pretrained(tiny_model(architecture))
    token_ids = encoder.tokenize(sentences[:8])
    direction = torch.randn(8, encoder.dimension)

    def gradients(forward):
        encoder.zero_grad()
        u, v = forward(token_ids)
        ((u.float() + v.float()) * direction).sum().backward()
        return u, {n: x.grad for n, x in encoder.named_parameters() if x.grad is not None}

    u, plain = gradients(encoder)
    low, ours = gradients(speed.in_bf16(encoder))
    assert (u.dtype, low.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(low.float(), u, rtol=0, atol=0.1)
    assert ours.keys() == plain.keys()
    assert all(x.dtype == torch.float32 for x in (*ours.values(), *encoder.parameters()))
    flat = [torch.cat([x[name].flatten() for name in plain]) for x in (ours, plain)]
    assert torch.cosine_similarity(*flat, dim=0).item() > 0.99


@torch.no_grad()
def test_attention_that_somebody_chose_stays(tiny_model, sentences):
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"))
    token_ids = encoder.tokenize(sentences[:4])
    line = encoder(token_ids)[0]
    encoder.backbone.set_attn_implementation("eager")
    assert not packs(encoder.backbone, token_ids)
    torch.testing.assert_close(encoder(token_ids)[0], line, rtol=0, atol=1e-5)
