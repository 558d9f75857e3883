"""IFTCL after the abstract: its twins and its queue against the formulas in float64."""

import re
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import elsewhere, one_line_refusal, train_until_interrupted
from test_processes import together

from fcse import losses
from fcse.config import configured
from fcse.encoder import SentenceEncoder
from fcse.methods.iftcl import IFTCL, changed_words, distances, kept, twins
from fcse.methods.sscl import SSCL
from fcse.objectives import InfoNCE
from fcse.training import read_run, train
from fcse.training.batches import compare, items, loss_of

pytestmark = pytest.mark.usefixtures("own_cache")

KEY = IFTCL.key
QUEUE, TWINS = IFTCL(twins=0.0, queue=2), IFTCL(twins=50.0, queue=0)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def vectors(count, seed=0, size=8, width=32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, width, dtype=torch.float64, generator=generator)


def term_by_hand(u, w, margin, v=None):
    total = 0.0
    for i in range(len(u)):
        nearest = 1 if v is None else unit(u[i]) @ unit(v[i])
        total += max(0.0, margin[i] - (nearest - unit(u[i]) @ unit(w[i]))) ** 2
    return total / len(u)


@pytest.mark.parametrize("between", [True, False])
def test_the_term_is_the_formula_with_its_derivative(between):
    u, w, v = (x.requires_grad_() for x in vectors(3, width=4))
    v = v if between else None
    margin = torch.linspace(0.2, 1.8, 8, dtype=torch.float64)
    found = twins(u, w, margin, v).square().mean()
    a, b = (unit(x.detach().numpy()) for x in (u, w))
    c = None if v is None else unit(v.detach().numpy())
    assert found.item() == pytest.approx(term_by_hand(a, b, margin.numpy(), c), rel=1e-12)

    # d term / d (u.w) = 2 max(0, margin - d) / N, and u.w moves w across itself alone.
    cosine = (a * b).sum(1)
    reached = (1 if c is None else (a * c).sum(1)) - cosine
    pull = 2 * np.maximum(0, margin.numpy() - reached) / 8
    assert (pull > 0).any() and (pull == 0).any()
    across = (a - cosine[:, None] * b) / np.linalg.norm(w.detach().numpy(), axis=1)[:, None]
    (by_w,) = torch.autograd.grad(found, w, retain_graph=True)
    np.testing.assert_allclose(by_w.numpy(), pull[:, None] * across, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x, y: twins(x, y, margin, v), (u, w))


def test_the_innate_margin_is_that_of_the_start_behind_the_head(made, sentences):
    encoder, _, acting, batch = made(TWINS)
    found = batch(1, range(8))
    texts, changed = found.sentences.texts[:8], found.sentences.texts[8:]
    encoder.eval()
    with torch.no_grad():
        for weight in encoder.parameters():
            weight += 0.1 * torch.randn_like(weight)  # as if trained
    assert not acting[KEY].first.training
    mine = distances(*acting[KEY].first(*(encoder.tokenize(x, 16) for x in (texts, changed))))
    assert not mine.requires_grad
    fresh = SentenceEncoder.from_pretrained(encoder.backbone.name_or_path, "cls", 0)
    with torch.no_grad():
        x, y = (
            torch.cat([fresh([ids])[0] for ids in fresh.tokenize(part, 16)])
            for part in (texts, changed)
        )
    expected = 1 - (unit(x.double().numpy()) * unit(y.double().numpy())).sum(1)
    np.testing.assert_allclose(mine.numpy(), expected, atol=1e-6)
    assert (expected > 1e-3).sum() > 4


@pytest.mark.parametrize("margin", ["between", "innate"])
def test_the_loss_of_a_step_is_the_formula_in_float64(margin, made):
    _, _, acting, batch = made(IFTCL(twins=3.0, queue=2, margin=margin))
    acting[KEY].first.double()
    u, v, w, old = vectors(4)
    first, second = batch(1, range(8)), batch(2, [3, *range(9, 16)])
    compared = compare(first, 0, old, old, w)
    empty = loss_of(InfoNCE(), [acting[KEY]], nullcontext(), compared).item()
    acting[KEY].after_step(1)
    found = loss_of(InfoNCE(), [acting[KEY]], nullcontext(), compare(second, 0, u, v, w)).item()

    def expected(step, u, v, columns):
        ids = step.sentences.token_ids
        margins = distances(*acting[KEY].first(ids[:8], ids[8:])).numpy()
        total = 0.0
        for i in range(8):
            cosines = [unit(u[i]) @ unit(v[j]) for j in range(8)]
            # Row 0 is sentence 3 again, of which the queue holds a view.
            queued = [unit(u[i]) @ unit(x) for j, x in enumerate(columns) if (i, j) != (0, 3)]
            z = np.exp(np.array(cosines + queued) / 0.05)
            total -= np.log(z[i] / z.sum())
        pair = v if margin == "between" else None
        return total / 8 + 3.0 * term_by_hand(u, w.numpy(), margins, pair)

    u, v, old = u.numpy(), v.numpy(), old.numpy()
    assert empty == pytest.approx(expected(first, old, old, []), rel=1e-10)
    assert found == pytest.approx(expected(second, u, v, old), rel=1e-10)


def test_no_gradient_reaches_the_queue_and_twins_reach_their_pairs(made):
    _, _, acting, batch = made(QUEUE)
    old = vectors(1)[0].requires_grad_()
    loss_of(InfoNCE(), [acting[KEY]], nullcontext(), compare(batch(1, range(8)), 0, old, old))
    acting[KEY].after_step(1)
    assert not acting[KEY].held[0][0].requires_grad
    u, v = (x.requires_grad_() for x in vectors(2, seed=1))
    compared = compare(batch(2, range(8, 16)), 0, u, v)
    loss_of(InfoNCE(), [acting[KEY]], nullcontext(), compared).backward()
    assert old.grad is None and u.grad.any() and v.grad.any()


def test_the_oldest_batch_leaves_first_whatever_process_it_is_seen_from(made):
    _, _, acting, batch = made(QUEUE)
    method, seen = acting[KEY], vectors(4)
    for step, v in enumerate(seen, start=1):
        found = batch(step, np.arange(8) + 8 * step)
        compared = compare(found, 0, v, v)
        if step == 3:  # the second of two processes has the last four in front
            turned = {name: getattr(compared, name).roll(-4, 0) for name in ("v", "of", "ids")}
            compared = replace(compared, **turned)
        # A method around it may ask for the loss more than once.
        for _ in range(2):
            acting[KEY].loss(lambda extended: extended.u.sum(), compared)
        acting[KEY].beside(compared)
        held = list(range(max(0, step - 3), step - 1))
        assert [x.tolist() for x, _ in method.held] == seen[held].tolist()
        method.after_step(step)
        assert torch.equal(method.held[-1][1], found.ids[:8])
    assert [x.tolist() for x, _ in method.held] == seen[2:].tolist()


@pytest.mark.parametrize("masked", [True, False])
def test_a_sentence_that_returns_is_left_out_for_itself_alone(masked, made):
    _, _, acting, batch = made(QUEUE, mask_duplicates=masked)
    x = vectors(1)[0]
    acting[KEY].beside(compare(batch(1, range(8)), 0, x, x))
    acting[KEY].after_step(1)
    compared = compare(batch(2, [5, 20, 21, 22, 23, 24, 25, 2]), 0, x, x)
    extended = acting[KEY].loss(lambda extended: extended, compared)
    assert extended.v.shape == (16, 32)
    ids = extended.numbers()
    if masked:
        left_out = losses.repeats(ids, 8, 16)
        assert left_out.nonzero().tolist() == [[0, 8 + 5], [7, 8 + 2]]
    else:
        assert ids is None


def test_either_part_alone(made, config, tmp_path):
    plain = train(elsewhere(config, tmp_path, "plain"))
    assert (
        train(elsewhere(config, tmp_path, "off", methods=(IFTCL(0.0, 0),))).losses == plain.losses
    )
    queue = train(elsewhere(config, tmp_path, "queue", methods=(QUEUE,)))
    # Nothing is in the queue at the first step, and nothing is brought: dropout is that of plain.
    assert queue.losses[0] == plain.losses[0]
    assert all(a > b for a, b in zip(queue.losses[1:3], plain.losses[1:3], strict=True))
    twins = train(elsewhere(config, tmp_path, "twins", methods=(TWINS,)))
    assert twins.losses[1:] != plain.losses[1:]
    _, _, acting, batch = made(QUEUE)
    assert items(batch(1, range(8))) == [
        (ids, None) for ids in batch(1, range(8)).sentences.token_ids
    ]
    _, _, acting, batch = made(TWINS)
    found = batch(1, range(8))
    assert items(found)[0][2] != items(found)[0][0]
    assert items(found) == items(made(TWINS)[-1](1, range(8)))
    assert items(batch(2, range(8))) != items(found)
    assert acting[KEY].state().keys() == {"counts"}


def test_a_term_that_never_acts_is_said_also_after_a_kill(config, tmp_path, sentences):
    words = [*dict.fromkeys(word for text in sentences for word in re.findall("[a-z]{6,}", text))]
    lone = tmp_path / "words.txt"  # none can be swapped: a margin of 0, which dropout always keeps
    lone.write_text("\n".join(words[:40]), encoding="utf-8")
    method = IFTCL(queue=0, change="swap", margin="innate")
    idle = replace(config, corpus=str(lone), methods=(method,))
    train_until_interrupted(idle, 4)
    (remark,) = train(idle).record["remarks"]
    assert re.fullmatch(r"iftcl's twins were too close in \d of 48 pairs, next to none", remark)
    acts = train(elsewhere(config, tmp_path, "acts", methods=(IFTCL(queue=0),)))
    assert acts.record["remarks"] == []
    queue = train(elsewhere(config, tmp_path, "queue", methods=(QUEUE,)))
    assert queue.record["remarks"] == []


def test_a_run_that_is_killed_goes_on_as_undisturbed(config, tmp_path):
    both = replace(config, methods=(IFTCL(twins=50.0, queue=3), SSCL(1)))
    undisturbed = train(elsewhere(both, tmp_path, "undisturbed"))
    train_until_interrupted(both, 4)
    again = train(both)
    assert again.losses == undisturbed.losses
    assert again.record["weights"] == undisturbed.record["weights"]


def test_micro_batches_give_the_same_losses(config, still_model, tmp_path):
    on = (IFTCL(twins=50.0, queue=3),)
    # At a higher rate Adam makes much of the last bits of gradients that are nearly 0.
    still = replace(config, encoder=str(still_model), methods=on, learning_rate=1e-4)
    whole = train(still)
    parts = train(elsewhere(still, tmp_path, "parts", micro_batch_size=3))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-4)


def test_two_processes_are_one(config, still_model, tmp_path):
    still = replace(config, encoder=str(still_model), methods=(IFTCL(twins=50.0, queue=2),))
    one = train(still)
    together(2, train, elsewhere(still, tmp_path, "two"))
    assert read_run(tmp_path / "two").losses == pytest.approx(one.losses, abs=1e-4)


@pytest.mark.parametrize("change", ["repetition", "deletion", "swap"])
@pytest.mark.parametrize("share", [0.0, 0.32, 1.0])
def test_words_change_as_named(change, share, sentences):
    generator = np.random.default_rng(1)
    numbers = set()
    for sentence in [*sentences[:200], "word", "two words"]:
        words = sentence.split()
        changed = changed_words(sentence, change, share, generator).split()
        most = max(1, int(share * len(words)))
        difference = {
            "repetition": len(changed) - len(words),
            "deletion": len(words) - len(changed),
        }
        number = difference.get(change, 1)
        assert 1 <= number <= most or (len(words) == 1 and changed == words)
        numbers.add(number)
        if change == "swap":
            assert sorted(changed) == sorted(words)
            moved = sum(a != b for a, b in zip(words, changed, strict=True))
            assert moved <= 2 * most
        else:
            longer, shorter = (changed, words) if change == "repetition" else (words, changed)
            rest = iter(longer)
            assert all(word in rest for word in shorter), "in their order"
            if change == "repetition":
                doubled = sum(a == b for a, b in pairwise(changed))
                assert doubled >= number
    assert changed
    assert (len(numbers) > 2) == (share > 0 and change != "swap")


def test_any_change_is_each_of_them_and_draws_depend_on_the_generator_alone():
    sentence = "one two three four five six seven eight nine ten"

    def drawn(seed):
        generator = np.random.default_rng(seed)
        return [changed_words(sentence, "any", 0.32, generator) for _ in range(300)]

    assert drawn(0) == drawn(0) != drawn(1)
    lengths = np.sign([len(x.split()) - 10 for x in drawn(0)])
    counts = np.bincount(lengths + 1)
    # Five standard deviations of a binomial count.
    assert (abs(counts - 100) < 5 * np.sqrt(300 * 2 / 9)).all()
    assert changed_words("a b", "swap", 0.32, np.random.default_rng(0)) == "b a"
    assert changed_words("a", "repetition", 0.32, np.random.default_rng(0)) == "a a"


def test_realised_against_innate_margins():
    x = np.random.default_rng(0).random(50)
    assert kept(x, x) == pytest.approx((1, 1))
    assert kept(x, 0.3 * x + 0.1) == pytest.approx((0.3, 1))
    y = np.random.default_rng(1).random(50)
    slope, _ = np.polyfit(x, y, 1)
    assert kept(x, y) == pytest.approx((slope, np.corrcoef(x, y)[0, 1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iftcl.twins": -1.0}, r"iftcl\.twins must be a finite number of at least 0, got -1"),
        ({"iftcl.queue": -1}, r"iftcl\.queue must be .* of at least 0, got -1"),
        ({"iftcl.share": 1.5}, r"iftcl\.share must lie between 0 and 1, got 1\.5"),
        ({"iftcl.margin": "mu"}, r"unknown iftcl\.margin 'mu': choose from between, innate"),
        ({"iftcl.change": "all"}, r"unknown iftcl\.change 'all': choose from any, repetition"),
    ],
    ids=str,
)
def test_bad_settings_are_one_line(settings, message, config):
    with one_line_refusal(message):
        configured(config, settings)


def test_a_queue_longer_than_the_corpus_is_one_line(config):
    with one_line_refusal(r"iftcl\.queue of 6 batches holds 48 sentences, more than the 40"):
        train(replace(config, methods=(IFTCL(queue=6),)))
    assert not config.folder.exists()
