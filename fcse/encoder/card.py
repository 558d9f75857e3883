"""The model card beside a saved encoder: what it is, how it was trained, what it scored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from fcse.data import is_file, is_folder

_PACKAGED = "sentence-transformers/all-MiniLM-L6-v2"

_TEXT = """---
{metadata}
---

# {title}

{base} after {steps} steps of the unsupervised loss `{objective}`, trained with fcse, a study kit
for [Focal-InfoNCE](https://arxiv.org/abs/2310.06918). Embeddings are read out by `{pooling}`
pooling; the training head is not part of them.

```python
from sentence_transformers import SentenceTransformer

vectors = SentenceTransformer("path/to/this/folder").encode(["A sentence.", "Another one."])
```

## Scores

100 × Spearman's rank correlation with human judgements, of the weights kept here: one run with
one seed, so a difference to another card's numbers is no evidence by itself.

{scores}

## Training

{training}

## Versions

{versions}
"""


def write_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Write README.md, with what hubs read, from what run.json holds of a finished run."""
    config, scores = record["config"], record["scores"]
    title = f"{config['recipe'] or config['objective']}, seed {config['seed']}"
    base = _PACKAGED if config["encoder"] == "minilm" else _name(config["encoder"])
    results = [
        EvalResult("sts", name, name, "spearman", round(value, 2))
        for name, value in scores.items()
        if not name.endswith(("_alignment", "_uniformity"))
    ]
    metadata = ModelCardData(
        base_model=base,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", config["objective"]],
        model_name=title,
        eval_results=results,
    )
    facts = {k: record[k] for k in ("kept_step", "device", "precision", "wall_time_s")}
    named = {k: _name(x) for k, x in config.items() if isinstance(x, str)} | {"encoder": base}
    training = config | named | facts | {f"corpus {k}": v for k, v in record["corpus"].items()}
    text = _TEXT.format(
        metadata=metadata.to_yaml(),
        title=title,
        base=base,
        steps=record["kept_step"],
        objective=config["objective"],
        pooling=config["pooling"],
        scores=_table("task", "score", {k: f"{v:.2f}" for k, v in scores.items()}),
        training=_table("setting", "value", training),
        versions=_table("package", "version", record["versions"]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _name(name_or_path: str) -> str:
    """A hub name as it is; of a path on one machine, also in FOLDER:COLUMN, only its last part."""
    if is_file(name_or_path) or is_folder(name_or_path):
        return Path(name_or_path).resolve().name
    folder, colon, column = name_or_path.rpartition(":")
    return _name(folder) + colon + column if folder else name_or_path


def _table(left: str, right: str, rows: Mapping[str, Any]) -> str:
    lines = [f"| {left} | {right} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {k} | {v} |" for k, v in rows.items() if v is not None])
