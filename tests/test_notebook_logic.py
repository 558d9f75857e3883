"""What the notebooks lean on: frames, samples, shares, verdicts, a discriminator's practice."""

from itertools import pairwise
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from fcse import analysis, data
from fcse.encoder import SentenceEncoder
from fcse.encoder.detection import Detection, Unigrams, practise
from fcse.evaluation import judge
from fcse.losses import gradient_weights
from fcse.study import findings
from fcse.study.embedded import histories, pick_runs, scores_of, trajectories
from fcse.study.tables import SCORES
from fcse.training import train


@pytest.fixture
def runs():
    def run(losses, lee):
        scored = [
            {"step": i, "lee": score, "lee_alignment": 0.1 * i, "lee_uniformity": -float(i)}
            for i, score in enumerate(lee)
        ]
        return SimpleNamespace(losses=losses, evaluations=scored)

    return {"InfoNCE": run([3.0, 2.0], [40.0, 41.0, 42.0]), "Focal-InfoNCE": run([5.0], [40.0])}


def test_histories_hold_each_loss_and_each_scoring_once(runs):
    losses, scorings = histories(runs)
    assert losses.to_dict("records") == [
        {"name": "InfoNCE", "step": 1, "loss": 3.0},
        {"name": "InfoNCE", "step": 2, "loss": 2.0},
        {"name": "Focal-InfoNCE", "step": 1, "loss": 5.0},
    ]
    assert list(scorings["name"]) == ["InfoNCE"] * 3 + ["Focal-InfoNCE"]
    assert list(scorings["lee"]) == [40.0, 41.0, 42.0, 40.0]


def test_a_run_without_steps_has_a_history_without_losses(runs):
    runs["InfoNCE"].losses = []
    losses, scorings = histories({"chosen encoder": runs["InfoNCE"]})
    assert list(losses) == ["name", "step", "loss"]
    assert losses.empty
    assert len(scorings) == 3


def test_trajectories_are_the_scorings_on_lee(runs):
    path = trajectories(runs)
    assert list(path) == ["name", "step", "alignment", "uniformity", "score"]
    assert list(path["uniformity"]) == [0.0, -1.0, -2.0, 0.0]
    assert list(path["score"]) == [40.0, 41.0, 42.0, 40.0]


def test_scores_of_an_encoder_leave_no_trace_and_those_of_a_run_are_kept(
    tiny_config, tiny_model, tmp_path, monkeypatch
):
    lee, chosen = data.load_lee(), pick_runs(tiny_model("bert"))
    (row,) = scores_of(chosen, [lee]).to_dict("records")
    (run,) = chosen.values()
    expected = judge(run.encoder, lee)
    expected = {"score": expected.pop("spearman")} | expected
    assert row == {"encoder": "chosen encoder", "task": "Lee"} | expected
    assert not (run.folder / SCORES).exists()

    run = train(tiny_config(tmp_path / "run", steps=2))
    table = scores_of({"InfoNCE": run}, [lee])
    assert list(table["encoder"]) == ["untrained", "InfoNCE"]
    by_hand = [judge(e, lee)["spearman"] for e in (run.encoder_at(0), run.encoder)]
    assert table["score"].tolist() == pytest.approx(by_hand)
    monkeypatch.setattr(SentenceEncoder, "encode", None)  # nothing is left to encode
    pd.testing.assert_frame_equal(scores_of({"InfoNCE": run}, [lee]), table)


def test_untrained_scores_are_those_of_the_runs_own_pooling(tiny_config, tmp_path):
    for pooling in ("cls", "mean"):
        run = train(tiny_config(tmp_path / pooling, steps=2, pooling=pooling))
        untrained = scores_of({"InfoNCE": run}, [data.load_lee()])["score"][0]
        assert untrained == pytest.approx(judge(run.encoder_at(0), data.load_lee())["spearman"])


@pytest.mark.parametrize(("n", "size"), [(10, 3), (64, 64), (18_836, 1_200)])
def test_spread_takes_evenly_spaced_items_from_all_over(n, size):
    rows = data.spread(range(n), size)
    assert len(rows) == size
    assert {b - a for a, b in pairwise(rows)} == {n // size}
    assert rows[0] == 0


def test_share_of_likely_false_negatives_is_theirs_of_the_absolute_pull():
    sim = torch.tensor([[0.9, 0.8, 0.1], [0.7, 0.9, 0.2], [0.1, 0.2, 0.9]], dtype=torch.float64)
    pull = gradient_weights(sim, "info_nce").abs()
    expected = (pull[0, 1] + pull[1, 0]) / (pull.sum() - pull.trace())
    share = analysis.false_negative_share(sim, ["a", "a", "b"], "info_nce")
    assert share == pytest.approx(expected.item())
    assert analysis.false_negative_share(sim, ["a", "b", "c"], "info_nce") == 0


@pytest.fixture
def gains():
    rows = [
        ("one", "InfoNCE", "Focal-InfoNCE", 0.5, 0.01),
        ("two", "InfoNCE", "Focal-InfoNCE", 0.5, 0.06),
        ("one", "InfoNCE", "Hardness-InfoNCE", -0.5, 0.01),
        ("two", "InfoNCE", "Hardness-InfoNCE", -0.1, 0.04),
    ]
    return pd.DataFrame(rows, columns=["corpus", "baseline", "contestant", "difference", "p_holm"])


def test_shown_asks_for_the_sign_and_for_a_corrected_p(gains):
    pair = "InfoNCE", "Focal-InfoNCE"
    assert findings.shown(gains, *pair).to_dict() == {"one": True, "two": False}
    assert not findings.shown(gains, *pair, sign=-1).any()
    assert findings.shown(gains, "InfoNCE", "Hardness-InfoNCE", sign=-1).all()
    assert findings.shown(gains, "InfoNCE", "no such loss").empty


def test_a_hypothesis_is_kept_where_it_holds_everywhere(gains):
    table = findings.verdicts(
        {
            "half": pd.Series([True, False], ["one", "two"]),
            "all": pd.Series([True, True], [0, 25]),
            "none": pd.Series([False], [0.05]),
            "never looked at": findings.shown(gains, "InfoNCE", "no such loss"),
        }
    ).set_index("hypothesis")
    assert table["verdict"].to_dict() == {
        "half": "dropped",
        "all": "kept",
        "none": "dropped",
        "never looked at": "dropped",
    }
    assert list(table["holds_at"]) == ["one", "0, 25", "-", "-"]


def test_a_discriminator_that_practises_gets_better_and_leaves_the_embeddings_alone(
    tiny_model, sentences
):
    encoder = SentenceEncoder.from_pretrained(tiny_model("bert"))
    token_ids = encoder.tokenize(sentences[:16], 32)
    vectors = torch.from_numpy(encoder.encode(sentences[:16])).requires_grad_()
    torch.manual_seed(0)
    detection = Detection(encoder, Unigrams(token_ids, encoder.tokenizer.all_special_ids))

    def mean_loss():
        torch.manual_seed(1)
        with torch.no_grad():
            found = [detection.eval()(vectors, token_ids)[1:] for _ in range(5)]
        return sum(binary_cross_entropy_with_logits(z, y.float()).item() for z, y in found) / 5

    before = mean_loss()
    practise(detection, vectors, token_ids, steps=30, learning_rate=3e-3)
    assert not detection.training
    assert mean_loss() < before - 0.05
    assert vectors.grad is None
