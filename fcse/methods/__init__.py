"""The seam for methods around the loss: their settings, and the moments at which they act.

A method is a file of this folder, named after it, or a class from anywhere: a frozen dataclass of
settings, a `Method`, whose `begin` gives the `Moments` of one run. Training, configs, run folders
and figures know methods through these two alone. A file here imports torch and the encoder only
within its functions, so that settings are read quickly."""

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from fcse.errors import InputError
from fcse.objectives import snake

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fcse.losses import Own, Turn


@dataclass(frozen=True)
class Start:
    """What there is before training: the run's config, its encoder and its tokenised corpus.

    train: config -> the finished run, for a method that needs another run first."""

    config: Any
    encoder: Any
    corpus: Any
    train: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Sentences:
    """n sentences: rows of the corpus (-1 for none of it), texts, and token ids."""

    rows: np.ndarray
    texts: Sequence[str]
    token_ids: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Brought:
    """What a method adds to a batch of B sentences, B each: other token ids for their second views;
    a further sentence, which is embedded once, see `Comparison.brought`."""

    second: Sequence[Sequence[int]] | None = None
    further: Sentences | None = None


@dataclass
class Batch:
    """A step's batch of B sentences of all processes, and what methods brought behind them.

    Attributes:
        step: from 1.
        size: B.
        sentences: the B, then B for each method that brought further ones.
        second: token ids of the second view, B, or None.
        places: key of a method that brought sentences -> the first of them.
        ids: one each, int64; equal where tokens are, and those are no negatives of each other.
        labels: further numberings, each like `ids`, as of `Moments.numbers`.
        masked_pairs: pairs of the B that are the same sentence."""

    step: int
    size: int
    sentences: Sentences
    second: Sequence[Sequence[int]] | None = None
    places: dict[str, int] = field(default_factory=dict)
    ids: "Tensor | None" = None
    labels: "tuple[Tensor, ...]" = ()
    masked_pairs: int = 0


@dataclass(frozen=True)
class Comparison:
    """This process' n anchors and the M columns of all processes that they are compared with.

    What comes in the order of sentences has this process' own first.

    Attributes:
        batch: of all processes.
        token_ids: of the n sentences.
        u: (n, D) float, the anchors.
        v: (M, D) float, the columns; the first n are the anchors' other views.
        of: (M,) int64, the place in `batch.sentences` of a column's sentence, -1 for none.
        ids: (M,) int64, as in `Batch`.
        always: (M,) bool: columns that count in every row, whatever sentence they are of.
        lower: (B, 2 * layers, D) float, both views' vectors of the lower layers asked for.
        brought: key of a method -> (B, D) float, the vectors of the sentences it brought.
        own, own_of: vectors that count in one row alone; (n,) int64 the sentence of its negative.
    """

    batch: Batch
    token_ids: Sequence[Sequence[int]]
    u: "Tensor"
    v: "Tensor"
    of: "Tensor"
    ids: "Tensor"
    always: "Tensor"
    lower: "Tensor | None" = None
    brought: "dict[str, Tensor]" = field(default_factory=dict)
    own: "Own | None" = None
    own_of: "Tensor | None" = None

    def more(
        self,
        vectors: "Tensor",
        of: "Tensor | None" = None,
        ids: "Tensor | None" = None,
        always: bool = False,
    ) -> "Comparison":
        """The same with K further columns, negatives in every row: (K, D), equal in all processes.

        of, ids: (K,) each, as in the class; where neither is given, or with `always`, none is left
        out as a false negative."""
        import torch

        count, device = len(vectors), self.v.device
        if ids is None:
            # Below those of sentences without a label, which are -1 and on.
            ids = -1 - len(self.batch.ids) - len(self.v) - torch.arange(count, device=device)
            ids = ids if of is None or always else self.batch.ids.to(device)[of]
        of = torch.full((count,), -1, device=device) if of is None else of
        return replace(
            self,
            v=torch.cat([self.v, vectors]),
            of=torch.cat([self.of, of]),
            ids=torch.cat([self.ids, ids.to(device)]),
            always=torch.cat([self.always, torch.full((count,), always, device=device)]),
        )

    def place(self, method: str | None = None) -> "Tensor":
        """`of` for the B sentences, (B,) int64, or for what a method brought with them."""
        return self.of[: self.batch.size] + (self.batch.places[method] if method else 0)

    def numbers(self, of: "Tensor | None" = None) -> "Tensor | None":
        """The numberings by which false negatives are told, see `losses.Columns`.

        Of the columns, (G, M) int64, or of some sentences by their places, (G, len(of)); None where
        no two columns can agree."""
        import torch

        device = self.v.device
        repeated = len(self.ids.unique()) < len(self.ids)
        labels = [x.to(device) for x in self.batch.labels]
        if of is not None:
            groups = [self.batch.ids.to(device)[of]] * repeated + [x[of] for x in labels]
        else:
            apart = -1 - len(self.batch.ids) - torch.arange(len(self.v), device=device)
            alone = self.always | (self.of < 0)
            groups = [self.ids] * repeated + [torch.where(alone, apart, x[self.of]) for x in labels]
        return torch.stack(groups) if groups else None


Loss = Callable[[Comparison], "Tensor"]
"""The loss of a comparison, as far as it is defined further in."""


class Moments:
    """When a method acts in a run; each moment does nothing unless a method says otherwise.

    `Method.begin` makes them, which is the moment before training.

    Attributes:
        layers: how many layers below the last both views are to bring along.
        module: parameters and buffers of its own: trained, saved with the run's state, dropped
            when the run is finished."""

    layers: int = 0
    module: "nn.Module | None" = None

    def before_step(self, step: int) -> None:
        """Act before a step, counted from 1; the encoder is in training mode."""

    def bring(self, batch: Batch) -> Brought | None:
        """Other tokens for the second views, or further sentences; from seed and step alone."""

    def receive(self, batch: Batch) -> None:
        """Look at the whole batch, once every method has brought its part."""

    def numbers(self, batch: Batch) -> "Tensor | None":
        """(S,) int64, a label for each sentence: those of one label are no negatives."""

    def objective(self, step: int, objective: Any) -> Any:
        """The objective of a step: a schedule of the temperature, say, or a row weight."""
        return objective

    def turn(self, compared: Comparison) -> "Turn | None":
        """What the similarities become before the objective sees them."""

    def loss(self, value: Loss, compared: Comparison) -> "Tensor":
        """Combine, extend or replace the loss: `value` of the comparison, of another, or of both.

        Methods act in the order of their keys, the first one outermost."""
        return value(compared)

    def beside(self, compared: Comparison) -> "Tensor | None":
        """A further loss, added once to the whole; computed in the run's precision."""

    def after_step(self, step: int) -> None:
        """Act after the optimiser has stepped."""

    def counted(self, batch: Batch) -> dict[str, float]:
        """Numbers of a step to log beside its loss, by names of this method's own."""
        return {}

    def remark(self) -> str:
        """What a trained run is to say of itself, such as that the method did nothing in it."""
        return ""

    def state(self) -> "dict[str, Tensor]":
        """What a resumed run must remember beside `module`: tensors by name."""
        return {}

    def restore(self, state: "dict[str, Tensor]") -> None:
        """Take what `state` gave."""


class Method:
    """The settings of a method: a frozen dataclass with its authors' values as defaults.

    Attributes:
        key: what the command line, TOML and run folders call it: its file, else its class.
        label: what tables and figures print.
        switches: the settings that turn it off where all of them are 0 or false."""

    key: ClassVar[str] = ""
    label: ClassVar[str] = ""
    switches: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        file = cls.__module__.removeprefix(f"{__name__}.")
        cls.key = file if file != cls.__module__ else snake(cls.__name__)

    @property
    def starts_from(self) -> str | None:
        """The model to start from in place of the packaged one, None for the config's own."""
        return None

    @property
    def on(self) -> bool:
        """Whether these settings change anything; a config leaves out what is off."""
        return not self.switches or any(getattr(self, name) for name in self.switches)

    @property
    def by_matrix(self) -> bool:
        """Whether a batch's similarity matrix shows all it does, see `training.batches.seen`.

        That is: no more than `receive`, `turn` and `objective`, and nothing of the corpus."""
        return False

    def fitted(self, encoder: str | Path) -> Self:
        """These settings with what depends on the encoder decided."""
        return self

    def check(self, config: Any) -> None:
        """Raise InputError where the rest of a config does not go with it, in one line."""

    def begin(self, start: Start) -> Moments:
        """Prepare a run; raise InputError where encoder or corpus do not go with it."""
        raise NotImplementedError

    def whole(self, config: Any, train: Any, folder: Any, callback: Any, score: Any) -> bool:
        """Make the whole run out of others, in an outer loop, and finish its folder.

        Or return False, with nothing done: then the run is trained as any other.

        Args:
            config: of the run.
            train: config and callback -> a finished run.
            folder: of the run, a `training.folder.RunFolder`.
            callback: gets the number of a step and the encoder, as that of `train` does.
            score: encoder -> what a run logs of it, see `evaluation.score`."""
        return False

    def files(self) -> tuple[str, ...]:
        """Names of model folders that decide the result, so that their bytes are part of a run."""
        return ()


def names() -> list[str]:
    """The keys of the kit's methods."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def method(named: str) -> type[Method]:
    """The settings class of a method of the kit, by its key; InputError where there is none."""
    if named not in names():
        raise InputError(f"unknown method {named!r}: choose from {', '.join(names())}")
    members = vars(import_module(f"{__name__}.{named}")).values()
    return next(x for x in members if isinstance(x, type) and getattr(x, "key", None) == named)
