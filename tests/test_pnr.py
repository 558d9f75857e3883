"""PNR's two terms against loops in float64, its arms, and runs that go on from another run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import one_line_refusal, train_until_interrupted

from fcse.config import TrainConfig, configured
from fcse.encoder import SentenceEncoder
from fcse.encoder.sentence_encoder import weights_hash
from fcse.losses import Columns, loss, similarity_matrix
from fcse.methods import Start
from fcse.methods.pnr import PNR, neighbour_overlap, predictor
from fcse.objectives import FocalInfoNCE, InfoNCE
from fcse.training import read_run, train
from fcse.training.batches import compare, loss_of, make_batch, views
from fcse.training.corpora import TokenizedCorpus

pytestmark = pytest.mark.usefixtures("own_cache")

OBJECTIVES = (InfoNCE(0.2), FocalInfoNCE(0.2))
ARMS = (
    PNR(),
    PNR(norm="layer", distillation=0.5),
    PNR(distillation=0.0),
    PNR(own_negatives=False),
    PNR(pseudo_negatives=False),
    PNR(pseudo_negatives=False, own_negatives=False),
)


@pytest.fixture
def made(config):
    """Settings -> what acts, its comparison of eight sentences in float64, two of them one."""

    def make(settings):
        encoder = SentenceEncoder.from_pretrained(config.encoder, "cls", 0)
        corpus = TokenizedCorpus.load(config.corpus, encoder, config.max_length)
        acting = {"pnr": settings.begin(Start(config, encoder.double(), corpus))}
        acting["pnr"].previous.double()
        if acting["pnr"].module is not None:
            acting["pnr"].module.double()
        batch = make_batch(config, corpus, acting, 1, np.array([0, 1, 2, 3, 4, 5, 6, 1]))
        generator = torch.Generator().manual_seed(1)
        u, v = torch.randn(2, 8, encoder.dimension, dtype=torch.float64, generator=generator)
        return acting["pnr"], compare(batch, 0, u.requires_grad_(), v.requires_grad_())

    return make


def by_hand(objective, anchors, positives, others, ids):
    """Each anchor against its positive and the true negatives among positives and others."""
    total = 0.0
    columns = np.concatenate([positives, others])
    columns = columns / np.linalg.norm(columns, axis=1, keepdims=True)
    for i, anchor in enumerate(anchors / np.linalg.norm(anchors, axis=1, keepdims=True)):
        kept = [j for j in range(len(columns)) if j == i or ids[j % len(ids)] != ids[i]]
        s = columns[kept] @ anchor
        own = np.array(kept) == i
        if isinstance(objective, FocalInfoNCE):
            s = np.where(own, s * s, s * (s + objective.m))
        z = s / objective.temperature
        total -= z[own].item() - np.log(np.exp(z).sum())
    return total / len(anchors)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("settings", ARMS, ids=str)
def test_both_terms_equal_the_formulas(made, settings, objective):
    acting, compared = made(settings)
    found = loss_of(objective, [acting], torch.autocast("cpu", enabled=False), compared)
    u, v = (x.detach().numpy() for x in (compared.u, compared.v))
    ids = compared.ids.tolist()
    f = acting.previous(compared.token_ids)[0].detach().numpy()
    nothing = np.zeros((0, u.shape[1]))
    expected = by_hand(objective, u, v, f if settings.pseudo_negatives else nothing, ids)
    if settings.distillation:
        g = acting.module(compared.u).detach().numpy()
        others = v if settings.own_negatives else nothing
        expected += settings.distillation * by_hand(objective, g, f, others, ids)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_the_terms_are_one_where_both_models_and_both_networks_are(made):
    acting, compared = made(PNR())
    f = acting.previous(compared.token_ids)[0]
    acting.module = torch.nn.Identity()
    twice = replace(compared, v=f)
    autocast = torch.autocast("cpu", enabled=False)
    one = made(PNR(distillation=0.0))[0]
    first, both = (loss_of(InfoNCE(0.2), [x], autocast, twice) for x in (one, acting))
    assert both.item() == pytest.approx(2 * first.item(), rel=1e-12)


def test_the_own_pseudo_negative_is_left_out(made):
    acting, compared = made(PNR(distillation=0.0))
    found = loss_of(InfoNCE(0.2), [acting], torch.autocast("cpu", enabled=False), compared)
    f = acting.previous(compared.token_ids)[0]
    sim = similarity_matrix(compared.u, torch.cat([compared.v, f]))
    ids = torch.cat([compared.ids, compared.ids])
    kept = loss(sim, InfoNCE(0.2), Columns(torch.cat([compared.ids, -1 - torch.arange(8)])))
    assert found.item() == pytest.approx(loss(sim, InfoNCE(0.2), Columns(ids)).item(), rel=1e-12)
    assert kept > found + 1e-3


def test_no_gradient_reaches_the_previous_model(made):
    acting, compared = made(PNR())
    loss_of(InfoNCE(), [acting], torch.autocast("cpu", enabled=False), compared).backward()
    assert all(p.grad is None for p in acting.previous.parameters())
    assert all(p.grad.any() for name, p in acting.module.named_parameters() if "0." in name)
    assert compared.u.grad.any()
    assert compared.v.grad.any()


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_predictor_comes_from_its_seed_alone(norm):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = weights_hash(predictor(32, norm, 3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert weights_hash(predictor(32, norm, 3)) == one != weights_hash(predictor(32, norm, 4))


@pytest.fixture
def previous(config, tmp_path):
    return train(replace(config, output=str(tmp_path / "previous")))


def go_on(config, previous, tmp_path, name="next", **changes):
    given = {"pnr.previous": str(previous.folder), "encoder": "minilm", "seed": 1} | changes
    return replace(configured(config, given), output=str(tmp_path / name))


def test_a_run_goes_on_from_the_previous_one(config, previous, tmp_path):
    weights = weights_hash(previous.encoder.backbone)
    run = train(go_on(config, previous, tmp_path))
    assert run.config.encoder == str(previous.folder)
    assert run.record["weights"]["first"] == weights
    assert weights_hash(read_run(previous.folder).encoder.backbone) == weights
    assert set(run.encoder.state_dict()) == set(previous.encoder.state_dict())
    file = str(previous.folder / "model/model.safetensors")
    assert file in run.record["files"]
    lines = (run.folder / "model/README.md").read_text()
    assert previous.folder.name in lines


def test_without_its_terms_it_is_training_from_the_previous_run(config, previous, tmp_path):
    off = {"pnr.pseudo_negatives": False, "pnr.distillation": 0.0}
    neutral = go_on(config, previous, tmp_path, **off)
    plain = replace(config, encoder=str(previous.folder), seed=1, output=neutral.output)
    assert neutral == plain
    assert train(neutral).losses != previous.losses


@pytest.mark.parametrize("settings", ARMS, ids=str)
def test_every_arm_trains_in_its_own_way(config, previous, tmp_path, settings):
    own = {f"pnr.{k}": v for k, v in vars(settings).items() if k != "previous"}
    run = train(go_on(config, previous, tmp_path, **own))
    plain = train(go_on(config, previous, tmp_path, "plain", objective="info_nce"))
    assert plain.config.methods[0] == PNR(previous=str(previous.folder))
    assert np.isfinite(run.losses).all()
    assert (run.record["weights"] == plain.record["weights"]) == (settings == PNR())


def test_a_killed_run_ends_in_the_same_weights(config, previous, tmp_path):
    undisturbed = train(go_on(config, previous, tmp_path, "undisturbed"))
    again = go_on(config, previous, tmp_path)
    train_until_interrupted(again, 4)
    resumed = train(again)
    assert resumed.losses == undisturbed.losses
    assert resumed.record["weights"] == undisturbed.record["weights"]


def test_micro_batches_give_the_same_losses(config, still_model, tmp_path):
    still = replace(config, encoder=str(still_model), methods=(PNR(),))
    whole = train(still)
    parts = train(replace(still, micro_batch_size=3, output=str(tmp_path / "parts")))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


def test_overlap_is_the_share_of_neighbours_that_stayed():
    x = np.random.default_rng(0).normal(size=(30, 6))
    assert neighbour_overlap(x, 3 * x, k=4) == 1
    y = np.random.default_rng(1).normal(size=(30, 6))
    cosines = [
        z @ z.T / np.outer(*[np.linalg.norm(z, axis=1)] * 2) - 9 * np.eye(30) for z in (x, y)
    ]
    near = [np.argsort(-c, axis=1)[:, :4] for c in cosines]
    expected = np.mean([len(set(a) & set(b)) / 4 for a, b in zip(*near, strict=True)])
    assert neighbour_overlap(x, y, k=4) == pytest.approx(expected)
    with one_line_refusal("k must be from 1 to 29"):
        neighbour_overlap(x, y, k=30)


def test_several_processes_cannot_share_a_batch_that_is_normalised(config, two_processes):
    encoder = SentenceEncoder.from_pretrained(config.encoder)
    with one_line_refusal("pnr.norm batch needs a batch in one process: set pnr.norm to layer"):
        PNR().begin(Start(config, encoder, None))
    PNR(norm="layer").begin(Start(config, encoder, None))


def test_bad_input_is_one_line(config, tmp_path):
    with one_line_refusal("encoder '.*nowhere' could not be loaded"):
        train(configured(config, {"pnr.previous": str(tmp_path / "nowhere"), "encoder": "minilm"}))
    with one_line_refusal("pnr starts from .*a: leave out the encoder"):
        TrainConfig(encoder="b", methods=(PNR(previous="a"),))
    with one_line_refusal("pnr.distillation must be a finite number of at least 0"):
        PNR(distillation=-1.0)
    with one_line_refusal("unknown pnr.norm 'none': choose from batch, layer"):
        PNR(norm="none")


def test_views_are_what_training_embeds(made, config):
    """The frozen copy reads the sentences of the batch, without dropout and with the head."""
    acting, compared = made(PNR())
    encoder = SentenceEncoder.from_pretrained(config.encoder, "cls", 0).double()
    u, *_ = views(encoder, 0, "float32", [(ids, None) for ids in compared.token_ids])
    torch.testing.assert_close(acting.previous(compared.token_ids)[0], u)
