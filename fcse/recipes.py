"""Named TrainConfigs: the embedded default and the paper's four."""

from dataclasses import replace

from fcse.config import TrainConfig
from fcse.errors import InputError
from fcse.objectives import FocalInfoNCE

_PAPER = TrainConfig(
    objective=FocalInfoNCE(temperature=0.05, m=0.3),
    corpus="wiki1m",
    max_length=32,
    eval_steps=125,
    metric="stsb_dev",
)
_MILLION = 1_000_000

# Batch size and learning rate: SimCSE's table of unsupervised recipes (Gao et al. 2021, README),
# which Focal-InfoNCE builds on; for roberta-base Hou & Li's own script gives 512 and 1e-5 too.
_BACKBONES = {
    "bert-base": ("bert-base-uncased", 64, 3e-5),
    "bert-large": ("bert-large-uncased", 64, 1e-5),
    "roberta-base": ("roberta-base", 512, 1e-5),
    "roberta-large": ("roberta-large", 512, 3e-5),
}

RECIPES: dict[str, TrainConfig] = {
    "minilm-wiki": TrainConfig(recipe="minilm-wiki"),
    "minilm-short": TrainConfig(
        recipe="minilm-short",
        batch_size=32,
        steps=25,
        learning_rate=5e-5,
        eval_steps=10,
        checkpoints=True,
    ),
} | {
    f"{name}-focal": replace(
        _PAPER,
        recipe=f"{name}-focal",
        encoder=encoder,
        batch_size=batch_size,
        learning_rate=learning_rate,
        steps=_MILLION // batch_size,
    )
    for name, (encoder, batch_size, learning_rate) in _BACKBONES.items()
}
"""Recipe name -> config: the embedded default, a short form of it that the notebooks train, and
the paper's four, each one epoch over a million sentences."""


def recipe(name: str) -> TrainConfig:
    """The config of a recipe; InputError: no recipe of that name."""
    if name not in RECIPES:
        raise InputError(f"unknown recipe {name!r}: choose from {', '.join(RECIPES)}")
    return RECIPES[name]
