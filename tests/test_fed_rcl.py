"""FedRCL: its terms against loops, how clients are dealt and averaged, and its rounds."""

import copy
import os
import socket
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import one_line_refusal
from own_process import CLEAN

from fcse import processes
from fcse.data import load_corpus, load_wiki_articles
from fcse.encoder import SentenceEncoder
from fcse.errors import InputError
from fcse.methods import Method, Moments, Start
from fcse.methods.fed_rcl import FedRCL, drift, mean_weights, partition, terms
from fcse.objectives import InfoNCE
from fcse.study.report import load_runs
from fcse.training import load_run, train
from fcse.training.batches import compare, loss_of, make_batch
from fcse.training.corpora import TokenizedCorpus

TAU = 0.05
ROUNDS = FedRCL(clients=3, rounds=2)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def articles(tmp_path_factory):
    """Text file with the first 24 sentences of five articles."""
    path = tmp_path_factory.mktemp("corpus") / "articles.txt"
    lines = [x for every in [*load_wiki_articles().values()][:5] for x in every[:24]]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def config(tiny_config, articles, tmp_path):
    return tiny_config(tmp_path / "run", objective="info_nce", corpus=str(articles), eval_steps=2)


def elsewhere(config, tmp_path, name, *on, **changes):
    return replace(config, output=str(tmp_path / name), methods=on, **changes)


def softmax(z):
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


def in_loops(sim, labels, form, threshold):
    """Contrast and penalty, and the gradient of each on every similarity, entry by entry."""
    n = len(sim)
    values, weights = np.zeros(2), np.zeros((2, n, n))
    for i in range(n):
        same = [j for j in range(n) if labels[j] == labels[i]]
        others = [j for j in same if j != i]
        if form == "code":
            least = min(same, key=lambda j: sim[i, j])
            apart = sorted({*range(n)} - {*same}, key=lambda j: -sim[i, j])[:2]
            p = softmax(sim[i, [least, *apart]] / TAU)
            values[0] -= np.log(p[0]) / n
            for j, share in zip([least, *apart], p, strict=True):
                weights[0, i, j] += (share - (j == least)) / TAU / n
            s = min((sim[i, j] for j in others), default=-1)
            s = s if s >= threshold else -1
            values[1] += np.log(1 + np.exp((s - 1) / TAU)) / n
            if s >= threshold:
                least = min(others, key=lambda j: sim[i, j])
                weights[1, i, least] += 1 / (1 + np.exp((1 - s) / TAU)) / TAU / n
            continue
        rest = [k for k in range(n) if k != i]
        p = dict(zip(rest, softmax(sim[i, rest] / TAU), strict=True))
        for j in others:
            values[0] -= np.log(p[j]) / len(others) / n
            weights[0, i, j] -= 1 / TAU / len(others) / n
            for k in rest:
                weights[0, i, k] += p[k] / TAU / len(others) / n
            if sim[i, j] > threshold:
                values[1] += sim[i, j] / TAU / len(others) / n
                weights[1, i, j] += 1 / TAU / len(others) / n
    return values, weights


def samples(n=12, classes=4, seed=0):
    """Cosines of vectors that lie about a few directions, float64, and a class that is alone."""
    generator = np.random.default_rng(seed)
    labels = np.array([classes, *generator.integers(classes, size=n - 1)])
    x = np.eye(classes + 1, 8)[labels] + generator.normal(scale=0.25, size=(n, 8))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T, labels


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("threshold", [0.7, -0.5, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_both_terms_and_their_gradients_are_those_of_the_loops(form, threshold, seed):
    sim, labels = samples(seed=seed)
    free = torch.tensor(sim, requires_grad=True)
    found = terms(free, torch.tensor(labels), form, threshold)
    values, weights = in_loops(sim, labels, form, threshold)
    np.testing.assert_allclose(found.detach().numpy(), values, rtol=1e-10, atol=1e-15)
    for term, expected in zip(found, weights, strict=True):
        (gradient,) = torch.autograd.grad(term, free, retain_graph=True)
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-9, atol=1e-15)
    alone = (labels == labels[0]).sum() == 1
    assert alone and (threshold > 0.9 or (weights[1] != 0).any())


def test_at_equal_weights_the_papers_penalty_leaves_the_softmax_share():
    sim, labels = samples()
    free = torch.tensor(sim, requires_grad=True)
    (gradient,) = torch.autograd.grad(terms(free, torch.tensor(labels), "paper", 0.7).sum(), free)
    z = np.where(np.eye(len(sim), dtype=bool), -np.inf, sim / TAU)
    share = np.exp(z) / np.exp(z).sum(1, keepdims=True) / TAU / len(sim)
    pair = (labels[:, None] == labels) & ~np.eye(len(sim), dtype=bool)
    above = pair & (sim > 0.7)
    np.testing.assert_allclose(gradient.numpy()[above], share[above], rtol=1e-9, atol=1e-12)
    below = pair & (sim <= 0.7)
    assert above.any() and below.any() and (gradient.numpy()[below] < share[below]).all()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("form", ["code", "paper"])
def test_few_samples_and_one_class_are_finite(size, form):
    x = torch.randn(size, 4, dtype=torch.float64, requires_grad=True)
    for labels in (torch.zeros(size, dtype=torch.int64), torch.arange(size)):
        unit = torch.nn.functional.normalize(x)
        found = terms(unit @ unit.T, labels, form, 0.7)
        found.sum().backward()
        assert found.isfinite().all() and x.grad.isfinite().all()


@pytest.fixture
def made(config):
    """Settings -> a batch of two sentences or one of each article, and what acts."""

    def make(settings):
        encoder = SentenceEncoder.from_pretrained(config.encoder, "cls", 0)
        corpus = TokenizedCorpus.load(config.corpus, encoder, config.max_length)
        acting = {"fed_rcl": settings.begin(Start(config, encoder, corpus))}
        return make_batch(config, corpus, acting, 1, np.arange(0, 120, 15)), acting

    return make


@pytest.mark.parametrize("form", ["code", "paper"])
@pytest.mark.parametrize("levels", [0, 2])
def test_the_loss_is_the_objective_and_the_mean_over_levels(made, form, levels):
    settings = FedRCL(rounds=0, contrast=0.5, penalty=2.0, form=form, levels=levels)
    batch, acting = made(settings)
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 8, 6, dtype=torch.float64, generator=generator).requires_grad_()
    # Another method asked for one layer more.
    lower = torch.randn(8, 2 * (levels + 1), 6, dtype=torch.float64, generator=generator)
    more = (levels + 1, u, v, lower) if levels else (0, u, v)
    bf16 = torch.autocast("cpu", torch.bfloat16)
    alone = loss_of(InfoNCE(), [], bf16, compare(batch, *more))
    found = loss_of(InfoNCE(), [*acting.values()], bf16, compare(batch, *more))
    assert found.dtype == torch.float64
    labels = np.tile([row // 24 for row in batch.sentences.rows], 2)
    expected = []
    for level in range(levels + 1):
        views = [u, v] if not level else [lower[:, level - 1], lower[:, levels + level]]
        x = torch.cat(views).detach().numpy()
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        values, _ = in_loops(x @ x.T, labels, form, 0.7)
        expected.append(0.5 * values[0] + 2 * values[1])
    assert (found - alone).item() == pytest.approx(np.mean(expected), rel=1e-9)
    more = more[0], *(x.float() for x in more[1:])
    low = [loss_of(InfoNCE(), on, bf16, compare(batch, *more)) for on in ([*acting.values()], [])]
    assert (low[0] - low[1]).item() == pytest.approx(np.mean(expected), rel=1e-4)
    (gradient,) = torch.autograd.grad(found - alone, u)
    assert gradient.abs().sum() > 0


def test_classes_are_articles_clusters_or_sentences(config):
    encoder = SentenceEncoder.from_pretrained(config.encoder, "cls", 0)
    of_articles = FedRCL().labels(config, encoder)
    np.testing.assert_array_equal(of_articles, np.repeat(range(5), 24))
    assert len(np.unique(FedRCL(classes="identity").labels(config, encoder))) == 120
    clusters = FedRCL(clients=2, classes="clusters").labels(config, encoder)
    assert clusters.shape == (120,) and 30 < len(np.unique(clusters)) <= 50
    again = FedRCL(clients=2, classes="clusters").labels(config, encoder)
    np.testing.assert_array_equal(clusters, again)


def test_sentences_are_dealt_disjoint_complete_in_order_and_from_the_seed_alone(config):
    encoder = SentenceEncoder.from_pretrained(config.encoder, "cls", 0)
    shares = ROUNDS.shares(config, encoder)
    corpus = load_corpus(config.corpus)
    assert sorted(sentence for share in shares for sentence in share) == sorted(corpus)
    place = {sentence: i for i, sentence in enumerate(corpus)}
    for share in shares:
        places = [place[sentence] for sentence in share]
        assert places == sorted(places)
    np.random.seed(9)
    torch.manual_seed(9)
    assert ROUNDS.shares(config, encoder) == shares
    assert ROUNDS.shares(replace(config, seed=7, batch_size=2), encoder) != shares


def test_a_dirichlet_draw_of_each_class_gives_the_clients_shares():
    labels = np.repeat(np.arange(400), 50)
    even = np.stack(
        [np.bincount(x, minlength=4) for x in np.split(partition(labels, 4, 1e5, 0), 400)]
    )
    # Five standard deviations of a binomial count.
    assert np.abs(even.sum(0) - 5000).max() < 5 * np.sqrt(20_000 * 3 / 16)
    assert even.std(ddof=1) == pytest.approx(np.sqrt(50 * 3 / 16), rel=0.1)
    uneven = np.stack(
        [np.bincount(x, minlength=4) for x in np.split(partition(labels, 4, 0.3, 0), 400)]
    )
    # A share's variance under Dirichlet is (1/4)(3/4) / (4 alpha + 1), a count's of n adds its own.
    share = 3 / 16 / 2.2
    expected = 50**2 * share + 50 * (3 / 16 - share)
    assert uneven.var() == pytest.approx(expected, rel=0.1)
    assert (uneven.max(1) > 45).mean() > 0.1 > (even.max(1) > 45).mean()


def test_the_mean_is_numpys_and_each_client_counts_alike():
    generator = torch.Generator().manual_seed(0)
    sent = [
        {"w": torch.randn(5, 7, generator=generator), "count": torch.tensor(4)} for _ in range(3)
    ]
    mean = mean_weights(sent)
    expected = np.mean([each["w"].numpy().astype(np.float64) for each in sent], axis=0)
    np.testing.assert_array_equal(mean["w"].numpy(), expected.astype(np.float32))
    assert mean["count"].dtype == torch.int64 and mean["count"] == 4
    assert torch.equal(mean_weights(sent[:1])["w"], sent[0]["w"])


def test_the_mean_after_one_plain_step_is_a_step_on_the_mean_gradient(config):
    """AdamW is not linear in gradients, so that this holds for a step of gradient descent alone."""
    start = SentenceEncoder.from_pretrained(config.encoder, "cls", 0).double()
    texts = load_corpus(config.corpus)
    sent, gradients = [], []
    for client in range(3):
        encoder = copy.deepcopy(start)
        u, v = encoder(encoder.tokenize(texts[24 * client : 24 * client + 8], 16))
        (u * torch.linspace(-1, 1, u.shape[1]) + v.square()).sum().backward()
        gradients.append(
            {k: p.grad.clone() for k, p in encoder.named_parameters() if p.grad is not None}
        )
        with torch.no_grad():
            for p in encoder.parameters():
                p -= 0.1 * p.grad if p.grad is not None else 0
        sent.append(encoder.state_dict())
    mean, before = mean_weights(sent), start.state_dict()
    for name, of_first in gradients[0].items():
        step = np.mean([each[name].numpy() for each in gradients], axis=0)
        np.testing.assert_allclose(
            mean[name].numpy(), before[name].numpy() - 0.1 * step, atol=1e-12
        )
        assert of_first.abs().sum() > 0


def test_drift_is_that_of_numpy():
    generator = np.random.default_rng(0)
    before = {"a": generator.normal(size=(3, 4)), "b": generator.normal(size=5)}
    sent = [{k: x + generator.normal(size=x.shape) for k, x in before.items()} for _ in range(3)]
    updates = [np.concatenate([(each[k] - x).ravel() for k, x in before.items()]) for each in sent]
    norms = [np.linalg.norm(x) for x in updates]
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosines = [updates[i] @ updates[j] / norms[i] / norms[j] for i, j in pairs]
    tensors = [{k: torch.tensor(x) for k, x in each.items()} for each in (before, *sent)]
    found = drift(tensors[0], tensors[1:])
    assert found == pytest.approx({"drift_norm": np.mean(norms), "drift_cosine": np.mean(cosines)})
    assert drift(tensors[0], tensors[1:2])["drift_cosine"] == 0


def test_one_client_in_one_round_is_central_training_to_the_bit(config, tmp_path):
    plain = train(elsewhere(config, tmp_path, "plain"))
    neutral = FedRCL(clients=1, rounds=1, contrast=0, penalty=0)
    alone = train(elsewhere(config, tmp_path, "alone", neutral))
    assert alone.losses == plain.losses
    assert alone.record["weights"] == plain.record["weights"]
    for name in ("model.safetensors", "head.safetensors"):
        assert (alone.folder / "model" / name).read_bytes() == (
            plain.folder / "model" / name
        ).read_bytes()
    assert alone.record["scores"] == plain.record["scores"]
    assert [x["lee"] for x in alone.evaluations] == [plain.evaluations[i]["lee"] for i in (0, -1)]


def test_a_run_in_rounds_is_read_as_any_other(config, tmp_path):
    run = train(elsewhere(config, tmp_path, "rounds", ROUNDS, steps=7, checkpoints=True))
    assert np.isfinite(run.losses).all() and len(run.losses) == 7
    assert [scored["step"] for scored in run.evaluations] == [0, 3, 7]
    assert run.steps == [0, 3, 7]
    assert not torch.equal(run.encoder_at(3).head[0].weight, run.encoder.head[0].weight)
    assert load_run(run.config).losses == run.losses
    (name,) = load_runs(tmp_path)["name"]
    assert name == "InfoNCE + FedRCL (clients=3, rounds=2)"
    assert len(load_runs(run.folder)) == 1
    plain = train(elsewhere(config, tmp_path, "plain"))
    there = {path.name for path in run.folder.iterdir()}
    assert there == {path.name for path in plain.folder.iterdir()} | {"checkpoints"}
    assert run.record.keys() == plain.record.keys() | {"clients"}
    assert run.record["corpus"] == plain.record["corpus"]
    assert sum(run.record["clients"]) == 120
    assert run.record["remarks"][0].startswith("fed_rcl is a simulation: 3 clients take turns")
    weights = sum(x.nbytes for x in run.encoder.state_dict().values())
    for scored in run.evaluations[1:]:
        assert -1 <= scored["fed_rcl.drift_cosine"] <= 1
        assert scored["fed_rcl.drift_norm"] > 0
        assert scored["fed_rcl.bytes_sent"] == 2 * 3 * weights
    # All 120 sentences, fewer than are looked at; their singular values by the Gram matrix.
    x = run.encoder.encode(load_corpus(config.corpus), normalize=True).astype(np.float64)
    values = np.sqrt(np.linalg.eigvalsh(x.T @ x).clip(0))
    rank = np.prod([(v / values.sum()) ** (-v / values.sum()) for v in values])
    assert run.evaluations[-1]["fed_rcl.effective_rank"] == pytest.approx(rank, rel=1e-3)


def test_the_weights_of_the_best_round_are_kept_where_that_is_asked(config, tmp_path):
    at = elsewhere(config, tmp_path, "best", FedRCL(2, 3), metric="lee", learning_rate=1e-2)
    run = train(at)
    best = max(run.evaluations[1:], key=lambda scored: scored["lee"])
    assert run.record["kept_step"] == best["step"]
    assert run.record["scores"]["lee"] == best["lee"]


def test_the_mean_of_clients_runs_is_what_the_rounds_make(config, tmp_path):
    """The first round by hand: plain runs on each client's sentences, and the mean of them."""
    settings = replace(ROUNDS, rounds=1, contrast=0.0, penalty=0.0)
    run = train(elsewhere(config, tmp_path, "rounds", settings))
    encoder = SentenceEncoder.from_pretrained(config.encoder, "cls", 0)
    runs = []
    for client, share in enumerate(settings.shares(config, encoder)):
        text = tmp_path / f"own{client}.txt"
        text.write_text("\n".join(share), encoding="utf-8")
        runs.append(train(elsewhere(config, tmp_path, f"own{client}", corpus=str(text))))
    for name, x in run.encoder.state_dict().items():
        expected = np.mean([r.encoder.state_dict()[name].double().numpy() for r in runs], axis=0)
        np.testing.assert_array_equal(x.numpy(), expected.astype(np.float32))
    np.testing.assert_allclose(run.losses, np.mean([r.losses for r in runs], axis=0), rtol=1e-12)


def test_each_term_changes_what_clients_learn(config, tmp_path):
    losses, weights = set(), set()
    for i, on in enumerate([{}, {"contrast": 0.0}, {"penalty": 0.0}, {"form": "paper"}]):
        settings = FedRCL(clients=2, rounds=1, threshold=0.3, **on)
        run = train(elsewhere(config, tmp_path, str(i), settings, steps=2, eval_steps=9))
        losses.add(tuple(run.losses))
        weights.add(run.record["weights"]["last"])
    assert len(losses) == len(weights) == 4


@pytest.fixture(scope="module")
def undisturbed(tiny_config, articles, tmp_path_factory):
    at = tmp_path_factory.mktemp("undisturbed") / "run"
    usual = {"objective": "info_nce", "corpus": str(articles), "eval_steps": 3}
    return train(tiny_config(at, methods=(ROUNDS,), **usual))


@pytest.mark.parametrize("calls", [4, 8, 14, 18])
def test_a_killed_run_goes_on_and_repeats_no_client_that_was_done(undisturbed, tmp_path, calls):
    """Three clients of three steps in each of two rounds: 18 steps in all."""
    at = replace(undisturbed.config, output=str(tmp_path / "killed"))
    seen = []

    def stop(step, encoder):
        seen.append(step)
        if len(seen) == calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(at, stop)
    left = {path.name for path in (at.folder / "clients").glob("round-*")}
    assert left == {"round-1" if calls <= 9 else "round-2"}
    again = []
    run = train(at, lambda step, encoder: again.append(step))
    assert again == ([1, 2, 3] * 3 + [4, 5, 6] * 3)[(calls - 1) // 3 * 3 :]
    assert run.losses == undisturbed.losses
    assert run.record["weights"] == undisturbed.record["weights"]
    assert run.evaluations == undisturbed.evaluations
    assert run.record["scores"] == undisturbed.record["scores"]
    assert {p.name for p in run.folder.iterdir()} == {p.name for p in undisturbed.folder.iterdir()}


@dataclass(frozen=True)
class Elsewhere(Method):
    """Names where a run starts."""

    start: str = ""

    @property
    def starts_from(self):
        return self.start

    def begin(self, start):
        return Moments()


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"clients": 6}, {}, r"fed_rcl\.clients must be at most 5, the classes"),
        ({}, {"batch_size": 60}, r"deals a client \d+ sentences, fewer than batch_size"),
        ({"levels": 3}, {}, r"fed_rcl\.levels must be at most 2, got 3"),
    ],
    ids=str,
)
def test_what_cannot_be_dealt_is_one_line_and_leaves_no_folder(
    config, tmp_path, settings, changes, message
):
    at = elsewhere(config, tmp_path, "run", replace(ROUNDS, **settings), **changes)
    with one_line_refusal(message):
        train(at)
    assert not at.folder.exists()


@pytest.mark.parametrize("rounds", [0, 2])
def test_other_text_is_refused_with_the_way_out_and_that_works(config, tmp_path, rounds):
    text = tmp_path / "own.txt"
    lines = [f"My {x} sentence about {y}." for x in ("first", "old") for y in range(40)]
    text.write_text("\n".join(lines))
    settings = FedRCL(clients=2, rounds=rounds)
    at = elsewhere(config, tmp_path, "run", settings, corpus=str(text))
    with one_line_refusal(r"own\.txt has sentences .* set fed_rcl\.classes to clusters"):
        train(at)
    assert not at.folder.exists()
    run = train(replace(at, methods=(replace(settings, classes="clusters"),)))
    assert np.isfinite(run.losses).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clients": 0}, r"fed_rcl\.clients must be .* at least 1"),
        ({"rounds": -1}, r"fed_rcl\.rounds must be .* at least 0"),
        ({"alpha": 0.0}, r"fed_rcl\.alpha must be .* at least 0\.001"),
        ({"contrast": -1.0}, r"fed_rcl\.contrast"),
        ({"penalty": float("nan")}, r"fed_rcl\.penalty"),
        ({"threshold": -2.0}, r"fed_rcl\.threshold"),
        ({"levels": -1}, r"fed_rcl\.levels"),
        ({"form": "own"}, r"fed_rcl\.form must be code or paper"),
        ({"classes": "topics"}, r"fed_rcl\.classes must be articles or clusters or identity"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_one_line(settings, message):
    with one_line_refusal(message):
        FedRCL(**settings)


def test_what_does_not_go_with_rounds_is_one_line(config):
    with one_line_refusal(r"fed_rcl\.rounds must be at most steps, 6"):
        replace(config, methods=(FedRCL(rounds=7),))
    other = Elsewhere(config.encoder)
    replace(config, methods=(FedRCL(rounds=1), other))
    with one_line_refusal(r"starts a round from the mean: set fed_rcl\.rounds to 1"):
        replace(config, methods=(FedRCL(rounds=2), other))


def _one_of_two(config, rank, port, path):
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in (ranks | where).items()}
    try:
        train(config)
    except InputError as error:
        path.write_text(str(error))
    processes.leave()


def test_two_processes_are_refused_in_one_line(config, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    at = elsewhere(config, tmp_path, "run", ROUNDS)
    said = [tmp_path / f"said{rank}.txt" for rank in range(2)]
    both = [CLEAN.Process(target=_one_of_two, args=(at, i, port, said[i])) for i in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert [each.exitcode for each in both] == [0, 0]
    expected = "fed_rcl trains in one process: start it without accelerate launch"
    assert [path.read_text() for path in said] == [expected] * 2
    assert not at.folder.exists()
