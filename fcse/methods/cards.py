"""CARDS: retrieved negatives, and switched case in the second view.

Source: Wang et al., SIGIR 2022 (arXiv 2206.02457). Each sentence brings one of its k nearest of the
corpus as a further negative, itself among the k; an anchor's own sentence is left out of the
retrieved columns. With a cased vocabulary the second view has the first letter of random words in
the other case, which gives a word other tokens, often more of them, at the same meaning.

As their scripts run it for RoBERTa-base: k = 65 found by the mean over tokens, each word switched
by itself with the probability 0.05 (their variant 2). For RoBERTa-large: k = 9 found by the first
token, of all words a share of 0.1 and at least one (variant 1). There as here the cut tokens of a
sentence are decoded, parted at spaces, and encoded again without a cut, and a word whose very first
character is no letter, a quoted one say, stays. An uncased vocabulary knows no case: there CARDS is
retrieval alone, and every table says so.
Where this differs from the authors:
- Repeats of a sentence are left out of its nearest. They keep them.
- They search at every step, with faiss, over embeddings computed once. Here one exact search
  beforehand gives every list.
- Letters whose other case is more than one letter (ß, SS) stay. There they are switched.
- They draw from the random state of the process. Here a draw depends on seed and step alone."""

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fcse.data import cache_folder, is_file, versions
from fcse.encoder.pooling import Pooling
from fcse.errors import InputError, first_line, replacing, writing
from fcse.methods import Batch, Brought, Comparison, Loss, Method, Moments, Sentences, Start
from fcse.objectives import require_share

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


_PRESETS: dict[str, dict[str, Any]] = {
    "base": {"k": 65, "readout": "mean", "case_switch": 0.05, "variant": 2},
    "large": {"k": 9, "readout": "cls", "case_switch": 0.1, "variant": 1},
}


@dataclass(frozen=True)
class CARDS(Method):
    """Settings of CARDS (Wang et al. 2022)."""

    preset: Literal["base", "large"] = "base"
    """The authors' script, for RoBERTa-base or -large: it has the values of what is not set."""
    k: int | None = None
    """Nearest sentences of the corpus, itself among them, of which each sentence brings one as a
    negative, >= 2; 0 brings none."""
    readout: Pooling | None = None
    """Pooling by which the nearest are found, before training."""
    case_switch: float | None = None
    """Share of words whose first letter changes case in the second view, 0 to 1; 0 where the
    vocabulary has no case."""
    variant: int | None = None
    """Which words: 1 takes that share of them and at least one, 2 each with that probability."""

    label = "CARDS"

    def __post_init__(self) -> None:
        if self.preset not in _PRESETS:
            raise InputError(f"unknown cards.preset {self.preset!r}: choose from base, large")
        for setting, usual in _PRESETS[self.preset].items():
            if getattr(self, setting) == usual:  # one way to write the same
                object.__setattr__(self, setting, None)
        k = self.value("k")
        if k == 1 or k < 0:
            raise InputError(f"cards.k must be at least 2, or 0 for no retrieval, got {k}")
        require_share("cards.case_switch", self.value("case_switch"))
        if self.value("variant") not in (1, 2):
            raise InputError(f"cards.variant must be 1 or 2, got {self.variant}")
        if self.value("readout") not in get_args(Pooling):
            choices = ", ".join(get_args(Pooling))
            raise InputError(f"unknown cards.readout {self.readout!r}: choose from {choices}")

    def value(self, setting: str) -> Any:
        """A setting, the preset's where it is not set."""
        own = getattr(self, setting)
        return _PRESETS[self.preset][setting] if own is None else own

    @property
    def on(self) -> bool:
        """Whether it retrieves, or switches case."""
        return bool(self.value("k") or self.value("case_switch"))

    @property
    def spelled(self) -> dict[str, str]:
        """What tables print for a setting in place of its value."""
        return {} if self.value("case_switch") else {"case_switch": "retrieval only"}

    def fitted(self, encoder: str | Path) -> "CARDS":
        """The same without case switching, where it is not set and the vocabulary has no case."""
        if self.case_switch is None and cased(str(encoder)) is False:
            return replace(self, case_switch=0.0)
        return self

    def begin(self, start: Start) -> Moments:
        """Search the corpus; InputError: an uncased vocabulary, or k is more than it has."""
        if self.value("case_switch"):
            require_cased(start.encoder.tokenizer)
        nearest = None
        if k := self.value("k"):
            nearest = _nearest(start.encoder, start.corpus, k, self.value("readout"))
        return _Retrieval(self, start, nearest)


class _Retrieval(Moments):
    def __init__(self, settings: CARDS, start: Start, nearest: np.ndarray | None) -> None:
        self.settings, self.start, self.nearest = settings, start, nearest

    def bring(self, batch: Batch) -> Brought:
        settings, seed = self.settings, self.start.config.seed
        second = further = None
        if share := settings.value("case_switch"):
            encoder = self.start.encoder
            token_ids = batch.sentences.token_ids[: batch.size]
            cut = encoder.tokenizer.batch_decode(token_ids, skip_special_tokens=True)
            texts = switched(cut, share, settings.value("variant"), seed, batch.step)
            second = encoder.tokenize(texts)
        if self.nearest is not None:
            rows = drawn(self.nearest, batch.sentences.rows[: batch.size], seed, batch.step)
            further = Sentences(rows, *self.start.corpus.batch(rows))
        return Brought(second, further)

    def numbers(self, batch: Batch) -> "Tensor | None":
        # Where repeated sentences are not told from others, an anchor's own is all the same.
        if self.nearest is None or self.start.config.mask_duplicates:
            return None
        return row_numbers(batch)

    def loss(self, value: Loss, compared: Comparison) -> "Tensor":
        if self.nearest is not None:
            compared = compared.more(compared.brought[CARDS.key], compared.place(CARDS.key))
        return value(compared)


def row_numbers(batch: Batch) -> "Tensor":
    """The row of the corpus that each sentence is, (S,) int64; a number of its own for others."""
    import torch

    rows = torch.from_numpy(batch.sentences.rows.astype(np.int64))
    return rows.where(rows >= 0, -1 - torch.arange(len(rows)))


def drawn(neighbours: np.ndarray, rows: np.ndarray, seed: int, step: int) -> np.ndarray:
    """One neighbour of each row of a batch, each of its k with equal probability.

    From seed and step alone, so that a resumed run draws what it would have drawn, and processes
    that share a batch draw for all of it and then take their part.

    neighbours: (n, k) integers, from `nearest`. rows: (B,) integers below n. seed, step: >= 0."""
    # The 1 keeps this stream apart from that of `switched`.
    columns = np.random.default_rng((1, seed, step)).integers(neighbours.shape[1], size=len(rows))
    return neighbours[rows, columns]


def _nearest(encoder: Any, corpus: Any, k: int, readout: Pooling) -> np.ndarray:
    """The sentence itself and its k - 1 nearest, (n, k), kept for the next run that asks."""
    from fcse.encoder.nearest import nearest
    from fcse.encoder.sentence_encoder import weights_hash

    def search() -> np.ndarray:
        ids = corpus.ids()
        most = len(ids) + 1 - int(np.unique(ids, return_counts=True)[1].max())
        if k > most:
            raise InputError(
                f"cards.k must be at most {most}, the distinct sentences of the corpus, got {k}"
            )
        reader = copy.copy(encoder)
        reader.pooling = readout
        others = nearest(corpus.embed(reader), k - 1, ids, encoder.device)
        return np.column_stack([np.arange(len(others), dtype=others.dtype), others])

    return found_once(search, [corpus.key, weights_hash(encoder.backbone), readout, k, versions()])


def found_once(search: Callable[[], np.ndarray], decides: list[Any]) -> np.ndarray:
    """What a search of the corpus finds, kept for the next run that asks; in all processes."""
    from fcse import processes

    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]
    path = cache_folder() / f"neighbours-{digest}.npy"
    world = processes.world()
    kept = path.is_file()
    world.wait_for_everyone()  # all have looked before the first one writes
    if kept:
        try:
            return np.load(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({first_line(error)}): delete it") from None
    found = search()
    if world.is_main_process:
        way_out = "name another folder with XDG_CACHE_HOME, or make room"
        with writing(path.parent, way_out), replacing(path) as new, new.open("wb") as file:
            np.save(file, found)
    return found


@cache
def cased(encoder: str) -> bool | None:
    """Whether an encoder's vocabulary tells "Word" from "word"; None where it is not at hand."""
    if encoder == "minilm":
        return False
    path = Path(encoder) / "model" if is_file(Path(encoder) / "run.json") else encoder
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception:  # whatever is wrong with it is said where it is loaded
        return None
    return _tells_case(tokenizer)


def _tells_case(tokenizer: "PreTrainedTokenizerBase") -> bool:
    capital, small = tokenizer(["Word", "word"])["input_ids"]
    return capital != small


def require_cased(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise InputError where case switching changes no tokens."""
    if not _tells_case(tokenizer):
        raise InputError(
            "case switching needs a cased vocabulary, and this one gives 'Word' and 'word' the "
            "same tokens: set cards.case_switch = 0, the retrieved negatives still work without it"
        )


def switched(
    sentences: Sequence[str], share: float, variant: int, seed: int, step: int
) -> list[str]:
    """The second view's sentences of a batch: `switch_case`, from seed and step alone."""
    # The 2 keeps this stream apart from that of `drawn`.
    generator = np.random.default_rng((2, seed, step))
    return [switch_case(sentence, share, variant, generator) for sentence in sentences]


def switch_case(sentence: str, share: float, variant: int, generator: np.random.Generator) -> str:
    """The sentence with the first letter of random words in the other case.

    sentence: its words are what spaces part; one space stays between them. share: 0 to 1, else
    InputError. variant: 1 takes that share of the words, rounded down, and at least one; 2 takes
    each with that probability. A word that does not begin with a letter stays as it is."""
    require_share("the share of words whose case is switched", share)
    words = sentence.split(" ")
    if variant == 1:
        count = max(1, int(share * len(words)))
        taken = generator.choice(len(words), count, replace=False)
    else:
        taken = np.flatnonzero(generator.random(len(words)) < share)
    for i in taken:
        other = words[i][:1].swapcase()
        words[i] = other + words[i][1:] if len(other) == 1 else words[i]
    return " ".join(words)
