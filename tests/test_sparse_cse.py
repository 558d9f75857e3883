"""SparseCSE: scores against differences and loops, nested masks, zeros that stay."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import one_line_refusal, train_until_interrupted

from fcse.encoder import SentenceEncoder
from fcse.encoder.sentence_encoder import weights_hash
from fcse.evaluation import alignment, uniformity
from fcse.methods.sparse_cse import (
    SparseCSE,
    alignment_score,
    contributions,
    mask_overlap,
    masks,
    parts,
    prune,
    uniformity_score,
)
from fcse.training import read_run, train

pytestmark = pytest.mark.usefixtures("own_cache")

KINDS = [True, False]


@pytest.fixture
def config(tiny_config, tmp_path):
    return tiny_config(tmp_path / "run", objective="info_nce", methods=(SparseCSE(0.3),))


@pytest.fixture
def encoder(still_model):
    """A tiny BERT in float64 without dropout: all views of a sentence are one."""
    return SentenceEncoder.from_pretrained(still_model, "cls", 0).double()


@pytest.fixture
def batches(encoder, sentences):
    return [encoder.tokenize(sentences[i : i + 6], 16) for i in (0, 6)]


def test_scores_are_those_of_the_evaluation():
    u, v = torch.randn(2, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert alignment_score(u, v).item() == pytest.approx(alignment(u, v), rel=1e-12)
    assert uniformity_score(u).item() == pytest.approx(uniformity(u), rel=1e-12)


def scaled(encoder, part, index, factor):
    """The encoder with the mask of one part at a factor."""
    changed = copy.deepcopy(encoder)
    weight = next(p.weight for p in parts(changed, True) if p[:2] == part[:2])
    with torch.no_grad():
        weight[:, index * part.wide : (index + 1) * part.wide] *= factor
    return changed


def uniformity_of(encoder, batch):
    with torch.no_grad():
        return uniformity_score(encoder.pool(encoder.features(batch))).item()


def test_a_signed_contribution_is_the_slope_of_the_scores(encoder, batches):
    """Central differences in the mask of each head and of some neurons; alignment is 0 here."""
    settings = SparseCSE(signed=True, balance=0.0)
    found = contributions(encoder, batches, settings, seed=0)
    h = 1e-5
    for part in parts(encoder, True):
        mine = found[part[:2]]
        slopes = []
        for index in range(min(len(mine), 6)):
            up, down = (scaled(encoder, part, index, 1 + x) for x in (h, -h))
            slope = sum(uniformity_of(up, b) - uniformity_of(down, b) for b in batches) / (2 * h)
            slopes.append(-slope)
        ratio = mine[: len(slopes)].numpy() / np.array(slopes)
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)  # divided by one norm a layer
        assert ratio[0] > 0
        assert mine.norm().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("structured", KINDS)
def test_a_contribution_joins_the_sizes_of_both_slopes(minilm, sentences, structured):
    """By loops over batches, kinds of score, and parts; dropout draws from the seed."""
    settings = SparseCSE(structured=structured, balance=0.3)
    batches = [minilm.tokenize(sentences[i : i + 4], 12) for i in (0, 4)]
    before = weights_hash(minilm)
    found = contributions(minilm, batches, settings, seed=3)
    assert weights_hash(minilm) == before
    encoder = copy.deepcopy(minilm)
    sums = {}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for batch in batches:
            u, v = (encoder.train().pool(encoder.features(batch)) for _ in range(2))
            x = encoder.eval().pool(encoder.features(batch))
            for which, value in enumerate((alignment_score(u, v), uniformity_score(x))):
                encoder.zero_grad()
                value.backward()
                for part in parts(encoder, structured):
                    product = (part.weight * part.weight.grad).detach().double().numpy()
                    if structured:
                        wide = part.wide
                        product = np.array(
                            [
                                product[:, i : i + wide].sum()
                                for i in range(0, product.shape[1], wide)
                            ]
                        )
                    at = (which, part[:2])
                    sums[at] = sums.get(at, 0) + np.abs(product).ravel()
    for key, mine in found.items():
        both = [sums[which, key] for which in (0, 1)]
        expected = [x / (np.linalg.norm(x) + 1e-7) for x in both]
        expected = 0.3 * expected[0] + 0.7 * expected[1]
        np.testing.assert_allclose(mine.numpy(), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("structured", KINDS)
@pytest.mark.parametrize("remove", ["lowest", "highest", "random", "magnitude"])
def test_masks_take_the_lowest_share_of_each_kind_and_nest(encoder, batches, structured, remove):
    settings = SparseCSE(structured=structured, remove=remove)
    scores = contributions(encoder, batches, settings, seed=0)
    kinds = {kind for kind, _ in scores}
    assert kinds == ({"heads", "neurons"} if structured else {"weights"})
    before = {kind: set() for kind in kinds}
    for sparsity in (0.0, 0.1, 0.25, 0.5, 0.9):
        kept = masks(scores, sparsity)
        for kind in kinds:
            ranked = sorted(
                (x, at, i)
                for at, key in enumerate(scores)
                if key[0] == kind
                for i, x in enumerate(scores[key].tolist())
            )
            gone = {
                (at, i)
                for at, key in enumerate(scores)
                if key[0] == kind
                for i in torch.nonzero(~kept[key]).flatten().tolist()
            }
            assert gone == {place[1:] for place in ranked[: int(sparsity * len(ranked))]}
            assert before[kind] <= gone
            before[kind] = gone


def test_controls_are_what_they_are_called(encoder, batches):
    found = {
        remove: contributions(encoder, batches, SparseCSE(remove=remove), seed=0)
        for remove in ("lowest", "highest", "magnitude", "random")
    }
    for key, lowest in found["lowest"].items():
        torch.testing.assert_close(found["highest"][key], -lowest)
    part = parts(encoder, True)[0]
    size = part.weight[:, : part.wide].square().sum()
    assert found["magnitude"][part[:2]][0].item() == pytest.approx(size.item())
    again, other = (contributions(encoder, [], SparseCSE(remove="random"), s) for s in (0, 1))
    half = {name: masks(x, 0.5) for name, x in (("0", again), ("1", other))}
    assert mask_overlap(half["0"], masks(found["random"], 0.5)) == 1
    assert mask_overlap(half["0"], half["1"]) < 0.6
    assert mask_overlap(masks(again, 0.0), masks(other, 0.0)) == 1


def test_what_is_removed_is_as_if_it_were_not_there(encoder, batches):
    """A removed head: its queries, keys and values no longer matter. Likewise a neuron."""
    kept = masks(contributions(encoder, batches, SparseCSE(), 0), 0.4)
    prune(encoder, kept)
    expected = uniformity_of(encoder, batches[0])
    for i, layer in enumerate(encoder.backbone.encoder.layer):
        heads = kept["heads", f"encoder.layer.{i}.attention.output.dense.weight"]
        rows = ~heads.repeat_interleave(encoder.dimension // len(heads))
        neurons = ~kept["neurons", f"encoder.layer.{i}.output.dense.weight"]
        with torch.no_grad():
            for name in ("query", "key", "value"):
                getattr(layer.attention.self, name).weight[rows] += 1
            layer.intermediate.dense.weight[neurons] += 1
    assert uniformity_of(encoder, batches[0]) == pytest.approx(expected, rel=1e-12)


def zeros(encoder, structured):
    """The share of parts that are 0 throughout."""
    gone = count = 0
    for part in parts(encoder, structured):
        weight = part.weight.detach()
        if structured:
            weight = weight.abs().sum(0).unflatten(0, (-1, part.wide)).sum(1)
        gone, count = gone + int((weight == 0).sum()), count + weight.numel()
    return gone / count


@pytest.mark.parametrize("structured", KINDS)
def test_zeros_outlive_training_and_saving(config, structured):
    methods = (SparseCSE(0.3, structured=structured),)
    seen = []
    run = train(replace(config, methods=methods), lambda _, x: seen.append(zeros(x, structured)))
    assert seen == pytest.approx([0.3] * 6, abs=0.05)
    assert f"removed {3 if structured else ''}" in run.record["remarks"][0]
    assert zeros(read_run(run.folder).encoder, structured) == seen[-1]


def test_the_dense_run_lies_beside_and_both_begin_alike(config, tmp_path):
    run = train(config)
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith("info_nce-seed0"))
    dense = read_run(folder)
    assert dense.config.methods == ()
    assert dense.record["weights"]["first"] == run.record["weights"]["first"]
    assert dense.losses == train(replace(config, methods=(), output=str(tmp_path / "alone"))).losses
    assert dense.losses != run.losses


def test_where_nothing_is_removed_it_is_plain_training(config, tmp_path):
    """A share that rounds to no part at all: training again gives the dense run to the bit."""
    none = replace(config, methods=(SparseCSE(0.001),), encoder=config.encoder)
    run = train(none)
    assert run.record["remarks"] == ["sparse_cse removed 0 of 12 heads, 0 of 192 neurons"]
    plain = train(replace(config, methods=(), output=str(tmp_path / "plain")))
    assert run.losses == plain.losses
    assert run.record["weights"] == plain.record["weights"]


def test_a_killed_run_ends_in_the_same_weights(config, tmp_path):
    undisturbed = train(replace(config, output=str(tmp_path / "undisturbed")))
    train_until_interrupted(config, 4)
    again = train(config)
    assert again.losses == undisturbed.losses
    assert again.record["weights"] == undisturbed.record["weights"]


def test_other_architectures_lose_single_weights_only(config, tiny_model, tmp_path):
    other = replace(config, encoder=str(tiny_model("distilbert")))
    with one_line_refusal("BERT's kind, not of distilbert: set sparse_cse.structured to false"):
        train(other)
    run = train(replace(other, methods=(SparseCSE(0.2, structured=False),)))
    assert zeros(run.encoder, False) == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, float("nan")])
def test_a_sparsity_out_of_range_is_one_line(sparsity):
    with one_line_refusal("sparse_cse.sparsity must be a finite number of at least 0 and below 1"):
        SparseCSE(sparsity)


def test_other_bad_settings_are_one_line():
    with one_line_refusal("sparse_cse.balance must lie between 0 and 1"):
        SparseCSE(balance=1.1)
    with one_line_refusal("sparse_cse.batches must be a finite number of at least 1"):
        SparseCSE(batches=0)
    with one_line_refusal("unknown sparse_cse.remove 'best': choose from lowest, highest"):
        SparseCSE(remove="best")
