"""CARDS: retrieved negatives, and switched case in the second view.

Source: Wang et al., SIGIR 2022 (arXiv 2206.02457). Each sentence brings one of its nearest
sentences of the corpus as a further negative. With a cased vocabulary the second view has the first
letter of random words in the other case, which gives a word other tokens, often more of them, at
the same meaning.

Their code switches a fixed number of words, a share of all and at least one (v1, for their large
model), or each word by itself with that probability (v2, for their base model). This is v2. As
there, a word whose very first character is no letter, a quoted one say, stays.
Where this differs from the authors:
- They take k = 9 or 65, and their search finds the sentence itself among them. Here the sentence
  and its repeats are left out before, so that the same candidates are k = 8 or 64.
- They search at every step, with faiss, over embeddings computed once. Here one exact search
  beforehand gives every list.
- They search by the mean over tokens for their base model, here by the run's own pooling.
- They decode a sentence's tokens, part words at spaces, and put one space between them. Here the
  sentence's own text is parted at any white space, and nothing else changes.
- Letters whose other case is more than one letter (ß, SS) stay. There they are switched.
- They draw from the random state of the process. Here a draw depends on seed and step alone."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fcse.data import cache_folder, versions
from fcse.errors import InputError, first_line, replacing, writing
from fcse.methods import Batch, Brought, Comparison, Loss, Method, Moments, Sentences, Start
from fcse.objectives import require, require_share

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class CARDS(Method):
    """Settings of CARDS (Wang et al. 2022)."""

    neighbours: int = 8
    """Nearest sentences of the corpus, of which each sentence brings one as a negative, >= 0; 0
    brings none."""
    case_switch: float = 0.0
    """Share of words whose first letter changes case in the second view, 0 to 1; needs a cased
    vocabulary."""

    label = "CARDS"
    switches = ("neighbours", "case_switch")

    def __post_init__(self) -> None:
        require("cards.neighbours", self.neighbours)
        require_share("cards.case_switch", self.case_switch)

    def begin(self, start: Start) -> Moments:
        """Search the corpus; InputError: an uncased vocabulary, or more neighbours than it has."""
        if self.case_switch:
            require_cased(start.encoder.tokenizer)
        nearest = None
        if self.neighbours:
            nearest = _nearest(start.encoder, start.corpus, self.neighbours)
        return _Retrieval(self, start, nearest)


class _Retrieval(Moments):
    def __init__(self, settings: CARDS, start: Start, nearest: np.ndarray | None) -> None:
        self.settings, self.start, self.nearest = settings, start, nearest

    def bring(self, batch: Batch) -> Brought:
        config, corpus = self.start.config, self.start.corpus
        second = further = None
        if share := self.settings.case_switch:
            texts = switched(batch.sentences.texts[: batch.size], share, config.seed, batch.step)
            second = self.start.encoder.tokenize(texts, config.max_length)
        if self.nearest is not None:
            rows = drawn(self.nearest, batch.sentences.rows[: batch.size], config.seed, batch.step)
            further = Sentences(rows, *corpus.batch(rows))
        return Brought(second, further)

    def loss(self, value: Loss, compared: Comparison) -> "Tensor":
        if self.nearest is not None:
            compared = compared.more(compared.brought[CARDS.key], compared.place(CARDS.key))
        return value(compared)


def drawn(neighbours: np.ndarray, rows: np.ndarray, seed: int, step: int) -> np.ndarray:
    """One neighbour of each row of a batch, each of its k with equal probability.

    From seed and step alone, so that a resumed run draws what it would have drawn, and processes
    that share a batch draw for all of it and then take their part.

    Args:
        neighbours: (n, k) integers, from `nearest`.
        rows: (B,) integers below n.
        seed, step: >= 0."""
    # The 1 keeps this stream apart from that of `switched`.
    columns = np.random.default_rng((1, seed, step)).integers(neighbours.shape[1], size=len(rows))
    return neighbours[rows, columns]


def _nearest(encoder: Any, corpus: Any, k: int) -> np.ndarray:
    """`nearest` of a corpus by this encoder, kept for the next run that asks for it."""
    from fcse import processes
    from fcse.encoder.nearest import nearest
    from fcse.encoder.sentence_encoder import weights_hash

    decides = [corpus.key, weights_hash(encoder.backbone), encoder.pooling, k, versions()]
    digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:32]
    path = cache_folder() / f"neighbours-{digest}.npy"
    world = processes.world()
    found = path.is_file()
    world.wait_for_everyone()  # all have looked before the first one writes
    if found:
        try:
            return np.load(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({first_line(error)}): delete it") from None
    neighbours = nearest(corpus.embed(encoder), k, corpus.ids(), encoder.device)
    if world.is_main_process:
        way_out = "name another folder with XDG_CACHE_HOME, or make room"
        with writing(path.parent, way_out), replacing(path) as new, new.open("wb") as file:
            np.save(file, neighbours)
    return neighbours


_FIRST_CHARACTER = re.compile(r"(?<!\S)\S")


def require_cased(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise InputError where case switching changes no tokens: "Word" and "word" have the same."""
    capital, small = tokenizer(["Word", "word"])["input_ids"]
    if capital == small:
        raise InputError(
            "case switching needs a cased vocabulary, and this one gives 'Word' and 'word' the "
            "same tokens: set cards.case_switch = 0, the retrieved negatives still work without it"
        )


def switched(sentences: Sequence[str], share: float, seed: int, step: int) -> list[str]:
    """The second view's sentences of a batch: `switch_case`, from seed and step alone."""
    # The 2 keeps this stream apart from that of `drawn`.
    generator = np.random.default_rng((2, seed, step))
    return [switch_case(sentence, share, generator) for sentence in sentences]


def switch_case(sentence: str, share: float, generator: np.random.Generator) -> str:
    """The sentence with the first letter of random words in the other case.

    Words are what white space parts; `share`, 0 to 1, is the probability of each that begins with a
    letter; there is one draw a word. Raises InputError where share is out of its range."""
    require_share("the share of words whose case is switched", share)

    def switch(first: re.Match[str]) -> str:
        other = first[0].swapcase()
        return other if generator.random() < share and len(other) == 1 else first[0]

    return _FIRST_CHARACTER.sub(switch, sentence)
