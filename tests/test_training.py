"""Runs: repeatable to the bit, recorded, reused, never overwritten; and what is refused."""

import inspect
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import lee_score, one_line_refusal

from fcse.config import TrainConfig, configured
from fcse.encoder import SentenceEncoder
from fcse.encoder.sentence_encoder import weights_hash
from fcse.errors import InputError
from fcse.objectives import FocalInfoNCE
from fcse.recipes import recipe
from fcse.training import load_run, loop, read_run, train
from fcse.training.loop import resolve_precision


@pytest.fixture
def config(tiny_config, tmp_path, sentences):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(sentences[:40]), encoding="utf-8")
    return tiny_config(tmp_path / "run", corpus=str(corpus))


def test_the_loop_is_one_function_of_at_most_a_hundred_lines():
    assert len(inspect.getsource(loop._train).splitlines()) <= 100


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def files(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.mark.parametrize("objective", ["info_nce", "focal_info_nce"])
def test_same_seed_same_losses_to_the_last_bit(config, tmp_path, objective):
    config = replace(config, objective=objective)
    first = train(config)
    torch.rand(7)  # what the process drew before must not matter
    second = train(replace(config, output=str(tmp_path / "again")))
    other = train(replace(config, output=str(tmp_path / "other"), seed=1))
    assert first.losses == second.losses
    assert first.record["weights"] == second.record["weights"]
    assert first.losses != other.losses
    for a, b in zip(first.encoder.parameters(), second.encoder.parameters(), strict=True):
        assert torch.equal(a, b)


def test_training_changes_the_weights_and_lowers_the_loss(config):
    result = train(replace(config, batch_size=40, steps=60))
    assert result.record["weights"]["first"] != result.record["weights"]["last"]
    assert sum(result.losses[-5:]) < sum(result.losses[:5])


def test_run_record(config):
    result = train(config)
    record = json.loads((result.folder / "run.json").read_text())
    assert record["config"]["learning_rate"] == 1e-3
    assert {"python", "torch", "transformers", "fcse"} <= record["versions"].keys()
    assert record["device"]
    assert record["precision"] == "float32"
    assert record["wall_time_s"] > 0
    assert record["corpus"]["sentences"] == 40
    for digest in (record["corpus"]["sha256"], *record["weights"].values()):
        assert len(bytes.fromhex(digest)) == 32


def test_metrics(config):
    result = train(config)
    steps = [line for line in lines(result.folder) if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in steps] == result.losses
    expected = [1e-3 * (1 - i / 6) for i in range(6)]
    assert [line["learning_rate"] for line in steps] == pytest.approx(expected)
    assert [line["step"] for line in result.evaluations] == [0, 3, 6]
    assert {"lee", "lee_alignment", "lee_uniformity"} <= result.evaluations[-1].keys()
    assert result.evaluations[-1]["lee"] == pytest.approx(lee_score(result.encoder), abs=1e-4)


def test_callback_sees_each_step_and_its_encoder(config):
    seen = []
    train(config, lambda step, encoder: seen.append((step, encoder.training)))
    assert seen == [(step, True) for step in range(1, 7)]


def test_a_finished_run_is_loaded(config):
    first = train(config)
    before = files(first.folder)
    again = train(config)
    assert files(first.folder) == before
    assert again.losses == first.losses
    assert load_run(config).evaluations == first.evaluations


def test_a_run_from_before_a_field_existed_is_this_run_at_its_default(config):
    result = train(config)
    path = result.folder / "run.json"
    record = json.loads(path.read_text())
    assert config.checkpoints == record["config"].pop("checkpoints")
    assert config.objective.stop_gradient == record["config"].pop("stop_gradient")
    path.write_text(json.dumps(record))
    assert load_run(config).losses == result.losses
    for field in ("checkpoints", "stop_gradient"):
        with one_line_refusal(rf"another run .*{field}"):
            load_run(configured(config, {field: True}))


@pytest.mark.parametrize(
    ("kind", "field"), [(TrainConfig, "checkpoints"), (FocalInfoNCE, "stop_gradient")]
)
def test_a_field_at_its_default_has_no_part_in_the_name(config, monkeypatch, kind, field):
    name = config.run_name
    changes = ((field, True), ("m", 0.0), ("seed", 9))
    names = {configured(config, {k: v}).run_name for k, v in changes}
    assert len(names | {name}) == 4
    monkeypatch.delitem(kind.__dataclass_fields__, field)  # as before it existed
    assert field not in config.settings
    assert config.run_name == name


def test_a_corpus_that_changed_is_another_run(config, monkeypatch, tmp_path):
    monkeypatch.setenv("FCSE_RUNS", str(tmp_path / "runs"))
    config = replace(config, output=None, steps=2)
    first = train(config)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(corpus.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    second = train(config)
    assert second.folder != first.folder
    assert second.losses != first.losses


def test_a_folder_with_another_run_is_left_alone(config):
    folder = train(config).folder
    before = files(folder)
    with pytest.raises(InputError, match=r"another run .*temperature"):
        train(replace(config, objective=FocalInfoNCE(0.1)))
    assert files(folder) == before


def test_a_folder_with_other_files_is_left_alone(config, tmp_path):
    notes = tmp_path / "run" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(InputError, match="no run"):
        train(config)
    assert [p.name for p in notes.parent.iterdir()] == ["notes.txt"]


def test_metric_keeps_the_best_evaluated_weights(config, tmp_path):
    # At a rate this high the score goes up and down, and for most seeds the last is not the best.
    config = replace(config, metric="lee", steps=6, eval_steps=1, learning_rate=3e-2)
    for seed in range(6):
        result = train(replace(config, seed=seed, output=str(tmp_path / f"seed{seed}")))
        scores = [line["lee"] for line in result.evaluations[1:]]
        assert lee_score(result.encoder) == pytest.approx(max(scores), abs=1e-4)
        if max(scores) > scores[-1]:
            return
    pytest.fail("the last weights were the best with every seed: nothing was shown")


def test_a_corpus_is_shuffled_anew_each_epoch(config, still_model):
    # Without dropout the loss depends on the batch and the weights; at rate ~0 on the batch alone.
    config = replace(config, encoder=str(still_model), steps=15, learning_rate=1e-12)
    losses = train(config).losses
    epochs = [losses[i : i + 5] for i in (0, 5, 10)]
    assert all(len(set(epoch)) == 5 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_modulate_none_is_info_nce(config, tmp_path):
    plain = train(replace(config, objective="info_nce"))
    none = FocalInfoNCE(modulate="none")
    focal = train(replace(config, objective=none, output=str(tmp_path / "none")))
    assert plain.losses == focal.losses
    assert plain.config.name == focal.config.name == "InfoNCE"


def test_bf16_runs(config):
    result = train(replace(config, precision="bf16", steps=2))
    assert result.record["precision"] == "bf16"
    assert all(torch.isfinite(p).all() for p in result.encoder.parameters())
    assert {p.dtype for p in result.encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("pooling", ["mean", "mean_first_last", "mean_top2"])
def test_other_poolings_train(config, pooling):
    assert len(train(replace(config, pooling=pooling, steps=2)).losses) == 2


@pytest.mark.parametrize("architecture", ["roberta", "distilbert", "mpnet", "modernbert"])
def test_other_architectures_train(config, tiny_model, architecture):
    result = train(replace(config, encoder=str(tiny_model(architecture)), steps=2))
    assert result.record["weights"]["first"] != result.record["weights"]["last"]


def test_the_packaged_encoder_learns(sentences, tmp_path):
    # One batch is the whole corpus: every step sees the same sentences, under other dropout.
    corpus = tmp_path / "one_batch.txt"
    corpus.write_text("\n".join(sentences[:16]), encoding="utf-8")
    changes = {"corpus": str(corpus), "batch_size": 16, "steps": 8, "max_length": 16}
    result = train(replace(recipe("minilm-short"), **changes, output=str(tmp_path / "run")))
    assert sum(result.losses[-3:]) < sum(result.losses[:3]) / 2


def test_a_corpus_smaller_than_a_batch_is_refused(config, tmp_path):
    with pytest.raises(InputError, match="40 sentences"):
        train(replace(config, batch_size=41))
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run(config, sentences):
    with one_line_refusal(
        r"at step 1 the loss is .* its sentences are in .* state is that of step 0"
    ):
        train(replace(config, objective=FocalInfoNCE(1e-38)))
    batch = (config.folder / "batch_of_step_1.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(batch)) == 8
    assert set(batch) <= set(sentences[:40])


def test_duplicates_are_masked_and_counted(config, sentences):
    Path(config.corpus).write_text("\n".join(sentences[:8] * 2), encoding="utf-8")
    whole_corpus = replace(config, batch_size=16, steps=2)
    assert train(whole_corpus).record["masked_pairs"] == 2 * 16
    unmasked = replace(whole_corpus, mask_duplicates=False, output=f"{config.output}-unmasked")
    assert train(unmasked).record["masked_pairs"] == 0
    assert load_run(whole_corpus).losses[0] < load_run(unmasked).losses[0]


def test_without_duplicates_the_mask_changes_nothing(config):
    unmasked = replace(config, mask_duplicates=False, output=f"{config.output}-unmasked")
    assert train(config).losses == train(unmasked).losses


@pytest.mark.parametrize(
    "field",
    [
        {"objective": "x"},
        {"modulate": "x"},
        {"pooling": "x"},
        {"precision": "x"},
        {"metric": "x"},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"m": float("inf")},
        {"batch_size": 1},
        {"steps": 0},
        {"max_length": 2},
        {"seed": -1},
        {"seed": 2**32},
        {"eval_steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(field):
    (name,) = field
    with one_line_refusal(rf"^(unknown )?{name} "):
        configured(TrainConfig(), field)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_precision_is_bf16_where_the_hardware_has_units_for_it(device, native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    found = resolve_precision("auto", torch.device(device))
    assert found == ("bf16" if native else "float32")
    for said in ("float32", "bf16"):
        assert resolve_precision(said, torch.device(device)) == said


@pytest.fixture
def with_units(monkeypatch):
    """A machine whose processor has units for bf16, or has none."""

    def make(there):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: there)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: there)

    return make


def test_auto_is_the_run_of_the_precision_that_is_taken(config, with_units, tmp_path):
    auto = replace(config, steps=2, precision="auto", output=None)
    names = {}
    for there, taken in ((True, "bf16"), (False, "float32")):
        with_units(there)
        names[taken] = auto.run_name
        assert auto.run_name == replace(auto, precision=taken).run_name
    assert names["bf16"] != names["float32"]
    here = replace(auto, output=str(tmp_path / "run"))
    first = train(here)
    assert first.record["precision"] == first.record["config"]["precision"] == "float32"
    with_units(True)
    with one_line_refusal(r"another run .*precision"):
        load_run(here)
    assert load_run(replace(here, precision="float32")).losses == first.losses


def test_a_record_that_says_auto_is_of_the_precision_it_took(config, with_units):
    with_units(False)
    result = train(replace(config, precision="auto", steps=2))
    path = result.folder / "run.json"
    record = json.loads(path.read_text())
    record["config"]["precision"] = "auto"
    path.write_text(json.dumps(record))
    assert load_run(replace(config, precision="float32", steps=2)).losses == result.losses
    with one_line_refusal(r"another run .*precision"):
        load_run(replace(config, precision="bf16", steps=2))


def test_scores_along_the_way_may_be_in_bf16(config, tmp_path):
    whole = train(replace(config, steps=2))
    other = replace(config, steps=2, score_precision="bf16", output=str(tmp_path / "bf16"))
    half = train(other)
    assert half.losses == whole.losses
    assert half.evaluations != whole.evaluations
    for one, two in zip(half.evaluations, whole.evaluations, strict=True):
        assert one["lee"] == pytest.approx(two["lee"], abs=2)
    with one_line_refusal(r"another run .*score_precision"):
        load_run(replace(other, score_precision="float32"))


def test_checkpoints_are_the_weights_along_the_way(config):
    weights = {}

    def watch(step, encoder):
        weights[step] = encoder.backbone.get_input_embeddings().weight.detach().clone()

    result = train(replace(config, checkpoints=True), watch)
    assert result.steps == [0, 3, 6]
    for step in (3, 6):
        kept = result.encoder_at(step).backbone.get_input_embeddings().weight
        # Half precision keeps 11 bits; the last step's weights are whole.
        torch.testing.assert_close(kept, weights[step], rtol=1e-3 if step == 3 else 0, atol=1e-6)
        assert not torch.equal(kept, weights[9 - step])
    start = SentenceEncoder.from_pretrained(config.encoder, seed=config.seed)
    assert weights_hash(result.encoder_at(0)) == weights_hash(start)
    with pytest.raises(InputError, match=r"weights of the steps \[0, 3, 6\], not of 4"):
        result.encoder_at(4)


def test_checkpoints_change_nothing_else(config, tmp_path):
    plain = train(config)
    kept = train(replace(config, checkpoints=True, output=str(tmp_path / "kept")))
    assert plain.losses == kept.losses
    assert plain.steps == [0, 6]


def test_a_run_is_read_by_its_folder_alone(config):
    trained = train(replace(config, checkpoints=True, pooling="mean"))
    path = trained.folder / "run.json"
    record = json.loads(path.read_text())
    record["versions"]["torch"] = "1.0"
    path.write_text(json.dumps(record))
    run = read_run(trained.folder)
    assert run.config == replace(config, checkpoints=True, pooling="mean")
    assert run.losses == trained.losses
    assert run.evaluations == trained.evaluations
    assert run.steps == trained.steps
    assert weights_hash(run.encoder) == weights_hash(trained.encoder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", "{"),
        ("run.json", "{}"),
        ("run.json", '{"finished": true, "config": {"colour": "red"}}'),
        ("metrics.jsonl", "{"),
        ("metrics.jsonl", None),
        ("model/model.safetensors", "x"),
        ("model/config.json", None),
    ],
)
def test_a_damaged_run_is_named(config, name, content):
    folder = train(config).folder
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with one_line_refusal(re.escape(str(folder))):
        read_run(folder)


def test_what_is_no_run_is_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(InputError, match="holds no finished run"):
            read_run(path)
