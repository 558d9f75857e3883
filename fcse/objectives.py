"""What an objective is: a value with its parameters, its logits, and the slopes of these.

An objective is a frozen dataclass with typed fields and

    logits(sim, positives): (N, M) float and (N, M) bool, True at the positives -> (N, M) float

and nothing else is needed: `fcse.losses` takes the loss, the pulls and the chunked loss from it.
Row i of the logits depends on row i alone, so that `sim` may be a block of rows of a larger matrix.
Two more methods are used where they are there:

    slopes(sim, positives) -> (N, M) float: d logit / d similarity, where each logit depends on its
        own similarity alone; else autograd finds the pulls.
    row_weight(log_p) -> (N,) float: what a row's loss -log p counts, from log p itself; else 1.

Nothing here imports torch: tensors come in as arguments."""

import ast
import dis
import hashlib
import inspect
import math
import re
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any, Literal, get_args

from fcse.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Modulate = Literal["both", "positive", "negative", "none"]
"""Which logits Focal-InfoNCE modulates."""


def require(what: str, value: float, least: float = 0, below: float = math.inf) -> None:
    """Raise InputError unless least <= value < below."""
    if not least <= value < below:
        most = f" and below {below:g}" if math.isfinite(below) else ""
        raise InputError(f"{what} must be a finite number of at least {least:g}{most}, got {value}")


def require_share(what: str, value: float) -> None:
    """Raise InputError unless 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise InputError(f"{what} must lie between 0 and 1, got {value}")


@dataclass(frozen=True)
class InfoNCE:
    """s / tau for every similarity s (SimCSE: Gao et al. 2021, equation 4).

    As with the others, a parameter out of its range raises InputError."""

    temperature: float = 0.05
    """tau > 0, the divisor of the logits."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature must be a finite number above 0, got {self.temperature}")

    def logits(self, sim: "Tensor", positives: "Tensor") -> "Tensor":
        """The logits, (N, M)."""
        return sim / self.temperature

    def slopes(self, sim: "Tensor", positives: "Tensor") -> "Tensor":
        """1 / tau everywhere, (N, M)."""
        return sim.new_ones(sim.shape) / self.temperature


@dataclass(frozen=True)
class FocalInfoNCE(InfoNCE):
    """s * s / tau for a positive, s * (s + m) / tau for a negative (Hou & Li 2023, section 3).

    The slopes are 2 s / tau and (2 s + m) / tau: a negative with s < -m/2 is drawn towards its
    anchor, so that it comes to rest at s = -m/2."""

    m: float = 0.3
    """Shift of the negatives' modulation s * (s + m)."""
    modulate: Modulate = "both"
    """Which logits are modulated: both, positive, negative or none."""
    stop_gradient: bool = False
    """Take the modulating factors, s and s + m, as constants: the logits stay, their slopes fall to
    s / tau and (s + m) / tau, and the resting point moves to s = -m. The authors do not."""

    label = "Focal-InfoNCE"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.m):
            raise InputError(f"m must be a finite number, got {self.m}")
        if self.modulate not in get_args(Modulate):
            choices = ", ".join(get_args(Modulate))
            raise InputError(f"unknown modulate {self.modulate!r}: choose from {choices}")

    def logits(self, sim: "Tensor", positives: "Tensor") -> "Tensor":
        """The logits, (N, M)."""
        factor = sim.detach() if self.stop_gradient else sim
        positive = sim * factor if self.modulate in ("both", "positive") else sim
        negative = sim * (factor + self.m) if self.modulate in ("both", "negative") else sim
        return positive.where(positives, negative) / self.temperature

    def slopes(self, sim: "Tensor", positives: "Tensor") -> "Tensor":
        """d logit / d s, (N, M)."""
        one = sim.new_ones(sim.shape)
        own = 0 if self.stop_gradient else sim  # the factor's share of the slope
        positive = sim + own if self.modulate in ("both", "positive") else one
        negative = sim + own + self.m if self.modulate in ("both", "negative") else one
        return positive.where(positives, negative) / self.temperature

    def canonical(self) -> "InfoNCE | FocalInfoNCE":
        """The same loss written in one way: what has no part in it is at its default."""
        if self.modulate == "none":
            return InfoNCE(self.temperature)
        return replace(self, m=FocalInfoNCE.m) if self.modulate == "positive" else self


@dataclass(frozen=True)
class HardnessInfoNCE(InfoNCE):
    """s / tau, and alpha * s as a constant on each negative (Lan et al. 2025, equation 5).

    arXiv 2503.04812; sentence-transformers has it as `hardness_mode="in_batch_negatives"`. The
    softmax moves towards hard negatives, and the slope of every logit stays 1 / tau."""

    alpha: float = 9.0
    """Hardness weight >= 0; 9 in the paper, 0 gives InfoNCE."""

    label = "Hardness-InfoNCE"

    def __post_init__(self) -> None:
        super().__post_init__()
        require("alpha", self.alpha)

    def logits(self, sim: "Tensor", positives: "Tensor") -> "Tensor":
        """The logits, (N, M)."""
        return sim / self.temperature + self.alpha * sim.detach().masked_fill(positives, 0)

    def canonical(self) -> "InfoNCE | HardnessInfoNCE":
        """The same loss written in one way."""
        return self if self.alpha else InfoNCE(self.temperature)


@dataclass(frozen=True)
class Recorded:
    """A reader's objective or method as a run's record has it: it prints, and cannot be computed.

    No code comes from a run's folder. key: of the class; printed: its name with its parameters;
    parameters: all that the record holds of it."""

    key: str
    printed: str
    parameters: tuple[tuple[str, Any], ...]

    on, by_matrix, starts_from = True, False, None

    def logits(self, *_: Any) -> None:
        """Raise InputError: the class is not at hand."""
        raise InputError(f"{self.printed} is known by its record only: define it again to use it")

    begin = whole = logits

    def fitted(self, encoder: Any) -> "Recorded":
        """The same: what depended on the encoder was decided."""
        return self

    def check(self, config: Any) -> None:
        """A finished run has been checked."""

    def files(self) -> tuple[str, ...]:
        """None that are known."""
        return ()


OBJECTIVES: dict[str, type] = {
    "info_nce": InfoNCE,
    "focal_info_nce": FocalInfoNCE,
    "hardness_info_nce": HardnessInfoNCE,
}
"""Name on the command line and in TOML -> class."""

VARIANTS = (
    InfoNCE(),
    FocalInfoNCE(),
    FocalInfoNCE(modulate="positive"),
    FocalInfoNCE(modulate="negative"),
    FocalInfoNCE(stop_gradient=True),
    HardnessInfoNCE(),
)
"""The objectives that the study compares, in the order of tables and figures."""


def named(objective: Any) -> Any:
    """An objective by its name, at its defaults; a value as it is; InputError for what is none."""
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            choices = ", ".join(OBJECTIVES)
            raise InputError(f"unknown objective {objective!r}: choose from {choices}")
        return OBJECTIVES[objective]()
    if not is_dataclass(objective) or isinstance(objective, type):
        raise InputError(
            f"objective {objective!r} is none: give a name ({', '.join(OBJECTIVES)}), or a value "
            "of a frozen dataclass with logits(sim, positives)"
        )
    what = type(objective).__name__
    if not type(objective).__dataclass_params__.frozen:
        raise InputError(f"objective {what} can change: write @dataclass(frozen=True) above it")
    if not callable(getattr(objective, "logits", None)):
        raise InputError(f"objective {what} has no logits(sim, positives): define that method")
    return objective


def parameters(value: Any) -> dict[str, Any]:
    """The fields of an objective or a method: whole numbers as floats where those are meant."""
    if isinstance(value, Recorded):
        return dict(value.parameters)
    return {f.name: _plain(f.type, getattr(value, f.name)) for f in fields(value)}


def _plain(hint: Any, value: Any) -> Any:
    if is_dataclass(value):
        return f"{key(value)}({', '.join(f'{k}={v}' for k, v in parameters(value).items())})"
    if isinstance(value, Path):
        return str(value)
    return float(value) if hint in (float, "float") and type(value) is int else value


def snake(name: str) -> str:
    """The name of a class in small letters with underscores."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def key(value: Any) -> str:
    """What the command line, TOML and run folders call an objective or a method.

    Its own `key` where it has one, else the kit's name for it, else its class in snake case."""
    if hasattr(value, "key"):
        return value.key
    known = next((name for name, kind in OBJECTIVES.items() if kind is type(value)), None)
    own = snake(type(value).__name__)
    return known or (f"own_{own}" if own in OBJECTIVES else own)


def name(value: Any) -> str:
    """What tables and figures print: the label, and each parameter that is not at its default.

    Parameters are spelled as in the code, so that equal names mean equal losses; or as `spelled`
    has them, where the value has it."""
    if isinstance(value, Recorded):
        return value.printed
    label = getattr(value, "label", None) or type(value).__name__
    kits = OBJECTIVES.values()
    if type(value) not in kits and label in [getattr(x, "label", x.__name__) for x in kits]:
        label = f"own {label}"
    defaults = {f.name: f.default for f in fields(value)}
    spelled = getattr(value, "spelled", {})
    shown = {k: v for k, v in parameters(value).items() if v != defaults[k]}
    said = [spelled.get(k, f"{k}={v}") for k, v in shown.items()]
    return f"{label} ({', '.join(said)})" if said else label


def rank(loss: str) -> int:
    """Where tables and figures put a loss, by its name: as in `VARIANTS`, others behind."""
    return [*map(name, VARIANTS), loss].index(loss)


def code(kind: type) -> str:
    """Eight hexadecimal digits over what a class does: two of one name may differ in it.

    That is its members, and the functions, classes and plain values of its module that they use:
    a helper or a constant of a notebook's cell decides too."""
    homes = {each.__module__ for each in kind.__mro__[:-1]}
    return hashlib.sha256(repr([*_does(kind, homes, [])]).encode()).hexdigest()[:8]


def _does(of: Any, homes: set[str], seen: list[Any]) -> Iterator[Any]:
    of = getattr(of, "fget", None) or getattr(of, "__func__", of)
    used: dict[Any, Any] = {}
    if isinstance(of, (bool, int, float, str, bytes)):
        yield of
    elif isinstance(of, (tuple, list)):
        used = dict(enumerate(of))
    elif getattr(of, "__module__", None) not in homes or any(of is each for each in seen):
        return
    elif isinstance(of, type):
        used = {k: v for each in of.__mro__[-2::-1] for k, v in vars(each).items()}
        used = {k: v for k, v in used.items() if callable(v) or not k.startswith("__")}
    elif isinstance(of, FunctionType):
        codes = [of.__code__]
        for each in codes:  # those of functions within join it
            codes += [x for x in each.co_consts if isinstance(x, CodeType)]
            loaded = {x.argval for x in dis.get_instructions(each) if x.opname == "LOAD_GLOBAL"}
            used |= {k: v for k, v in of.__globals__.items() if k in loaded}
            said = [x for x in each.co_consts if not isinstance(x, CodeType)]
            said = [sorted(map(repr, x)) if isinstance(x, frozenset) else x for x in said]
            yield each.co_code, each.co_names, said
        cells = zip(of.__code__.co_freevars, of.__closure__ or (), strict=True)
        used |= {k: cell.cell_contents for k, cell in cells}
        used |= {"": of.__defaults__ or ()} | (of.__kwdefaults__ or {})
    seen.append(of)
    for k in sorted(used):
        yield k
        yield from _does(used[k], homes, seen)


@cache
def documented(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, its bases' too, as far as sources are read."""
    found: dict[str, str] = {}
    for each in kind.__mro__[-2::-1]:
        with suppress(OSError, TypeError):  # defined where there is no source
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
            for above, below in pairwise(definition.body):
                if isinstance(above, ast.AnnAssign) and isinstance(below, ast.Expr):
                    found[above.target.id] = " ".join(ast.literal_eval(below.value).split())
    return found
