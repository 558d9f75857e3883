"""Case switching: the second view has the first letter of random words in the other case (CARDS).

Source: Wang et al., SIGIR 2022 (arXiv 2206.02457), share 0.05 to 0.15. A vocabulary that tells
cases apart gives a switched word other tokens, often more of them, at the same meaning.

The authors' code has two rules: a fixed number of words, a share of all and at least one (v1, for
their large model), or each word by itself with that probability (v2, for their base model). This
is v2. As there, a word whose very first character is no letter, a quoted one say, stays.
Where this differs from the authors:
- They decode a sentence's tokens, part words at spaces, and put one space between them. Here the
  sentence's own text is parted at any white space, and nothing else changes.
- Letters whose other case is more than one letter (ß, SS) stay. There they are switched.
- They draw from the random state of the process. Here a draw depends on seed and step alone.
"""

import re
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from fcse.errors import InputError

_FIRST_CHARACTER = re.compile(r"(?<!\S)\S")


def require_cased(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that case switching changes tokens, by tokenising a word both ways.

    Raises:
        InputError: "Word" and "word" have the same token ids.
    """
    capital, small = tokenizer(["Word", "word"])["input_ids"]
    if capital == small:
        raise InputError(
            "case switching needs a cased vocabulary, and this one gives 'Word' and 'word' the "
            "same tokens: set case_switch = 0, the retrieved negatives still work without it"
        )


def switched(sentences: Sequence[str], share: float, seed: int, step: int) -> list[str]:
    """The second view's sentences of a batch, see `switch_case`.

    Nothing is kept from step to step, as in `retrieval.drawn`: the same batch, seed and step give
    the same sentences; processes that share a batch switch all of it and then take their part.

    Args:
        sentences: the batch of this step.
        share: 0 to 1, the probability of a word.
        seed, step: >= 0, what the draw depends on.

    Raises:
        InputError: share is out of its range.
    """
    # The 2 keeps this stream apart from that of `retrieval.drawn`.
    generator = np.random.default_rng((2, seed, step))
    return [switch_case(sentence, share, generator) for sentence in sentences]


def switch_case(sentence: str, share: float, generator: np.random.Generator) -> str:
    """The sentence with the first letter of random words in the other case.

    Args:
        sentence: any text; words are what white space parts.
        share: 0 to 1, the probability of each word that begins with a letter to be switched. 0
            gives the sentence itself.
        generator: where the draws come from, one a word.

    Raises:
        InputError: share is out of its range.
    """
    if not 0 <= share <= 1:
        raise InputError(
            f"the share of words whose case is switched must lie between 0 and 1, got {share}"
        )

    def switch(first: re.Match[str]) -> str:
        other = first[0].swapcase()
        return other if generator.random() < share and len(other) == 1 else first[0]

    return _FIRST_CHARACTER.sub(switch, sentence)
