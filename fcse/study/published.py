"""Published scores as data with their sources, and the seed noise to read them against.

All are 100 x Spearman, mean of the seven STS tasks, "all" setting, test splits."""

import pandas as pd

FOCAL_INFONCE = {
    "bert-base-uncased": 77.32,
    "bert-large-uncased": 78.72,
    "roberta-base": 77.58,
    "roberta-large": 78.74,
}
"""Hou & Li 2023 (arXiv 2310.06918), the authors' repository README: one run each."""

SIMCSE = {
    "bert-base-uncased": 76.25,
    "bert-large-uncased": 78.41,
    "roberta-base": 76.57,
    "roberta-large": 78.90,
}
"""Gao et al. 2021 (arXiv 2104.08821), the authors' repository README: one run each."""

SIMCSE_50_SEEDS = {
    "bert-base-uncased": {"n": 50, "mean": 75.107, "sd": 0.844, "min": 73.160, "max": 76.703},
    "bert-large-uncased": {"n": 50, "mean": 74.950, "sd": 1.737, "min": 70.306, "max": 77.276},
    "roberta-base": {"n": 50, "mean": 74.603, "sd": 0.213, "min": 74.175, "max": 75.143},
    "roberta-large": {"n": 50, "mean": 76.715, "sd": 0.497, "min": 75.635, "max": 77.692},
}
"""hppRC/simple-simcse: 50 runs of unsupervised SimCSE with the paper's recipe, seeds 0 to 49."""


def results() -> list[dict[str, str | float]]:
    """The published averages: "backbone", "name" of the loss, "source" and "avg" of each."""
    return [
        {"backbone": backbone, "name": name, "source": "published", "avg": avg}
        for name, averages in (("InfoNCE", SIMCSE), ("Focal-InfoNCE", FOCAL_INFONCE))
        for backbone, avg in averages.items()
    ]


def gains() -> pd.DataFrame:
    """Each backbone's published scores beside 50 seeds of SimCSE.

    Returns: Columns "backbone", "simcse", "focal_infonce" (published), "gain" (their difference),
    "mean", "sd", "min", "max" (of the 50 seeds), "simcse_z", "focal_infonce_z": by how many
    standard deviations of seed noise a published score lies above the 50-seed mean, and "gain_z":
    how many of them the published gain spans."""
    table = pd.DataFrame({"simcse": SIMCSE, "focal_infonce": FOCAL_INFONCE})
    table["gain"] = table["focal_infonce"] - table["simcse"]
    seeds = pd.DataFrame(SIMCSE_50_SEEDS).T[["mean", "sd", "min", "max"]]
    for score in ("simcse", "focal_infonce"):
        seeds[f"{score}_z"] = (table[score] - seeds["mean"]) / seeds["sd"]
    seeds["gain_z"] = table["gain"] / seeds["sd"]
    return table.join(seeds).rename_axis("backbone").reset_index()
