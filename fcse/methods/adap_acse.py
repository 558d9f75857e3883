"""AdapACSE: an angular margin that a teacher sizes.

Source: KDMCSE, Nguyen et al., NAACL 2024 (arXiv 2403.17486), with their code. A margin makes a
negative look nearer than it is, so that more must be done; it is the larger, the less alike a
teacher finds the two sentences: with theta = arccos(s) > margin and the teacher's similarity t, a
negative's s gives way to s' = cos(theta - (1 - t) margin). As in their code s' jumps at theta =
margin.

Both of their released scripts take a margin of 0.15.
Where this differs from their code:
- Theirs distils from CLIP, and its teacher sizes the margin in the cross-modal terms only, of a
  text against pictures and against CLIP's own texts; text against text gets the whole margin. Here
  there are no pictures, and the teacher sizes it in text.
- The teacher is no CLIP. By default it is the words that sentences share: TF-IDF of the corpus,
  reduced by a singular value decomposition, which has seen no supervision. Or it is an encoder,
  read out by the mean over tokens. Where that is the student's own backbone, as with the packaged
  encoder, it says little: it finds nearly all pairs equally unlike."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from fcse.data import corpus_reader
from fcse.errors import InputError
from fcse.methods import Batch, Comparison, Method, Moments, Start
from fcse.objectives import require

if TYPE_CHECKING:
    from torch import Tensor

    from fcse.losses import Turn

TERMS = "tf-idf"
"""The teacher that needs no model."""

_COMMON = 0.05
"""Words in more than this share of the sentences say nothing of what a sentence is about."""


@dataclass(frozen=True)
class AdapACSE(Method):
    """Settings of AdapACSE (Nguyen et al. 2024)."""

    margin: float = 0.15
    """Radians, 0 to below pi/2, by which negatives the teacher finds unlike come closer; 0 turns it
    off."""
    teacher: str = TERMS
    """What sizes the margin: tf-idf of the corpus, or an encoder's mean readout: minilm, a model
    folder or a hub name."""

    label = "AdapACSE"
    switches = ("margin",)
    by_matrix = True

    def __post_init__(self) -> None:
        require("adap_acse.margin", self.margin, below=math.pi / 2)

    def begin(self, start: Start) -> Moments:
        """Load or fit the teacher; raise InputError where it is not there."""
        return _Margin(self.margin, teacher_of(self.teacher, start)[0])

    def files(self) -> tuple[str, ...]:
        """The teacher, where it is a model."""
        return () if self.teacher == TERMS else (self.teacher,)


def teacher_of(named: str, start: Start) -> tuple[Callable[[Sequence[str]], np.ndarray], str]:
    """What embeds n texts, (n, D) float32, and a name that only equal ones of a corpus share."""
    if named == TERMS:
        return Terms(corpus_reader(start.config.corpus)()).encode, TERMS
    from fcse import processes
    from fcse.encoder.sentence_encoder import SentenceEncoder, weights_hash

    encoder = SentenceEncoder.from_pretrained(named, "mean").eval().to(start.encoder.device)
    return partial(processes.encode, encoder), weights_hash(encoder.backbone)


class Terms:
    """Sentences by the words they hold: TF-IDF, reduced by a truncated SVD (latent semantics).

    Vectors come from the corpus alone; the same corpus gives the same vectors on one machine."""

    def __init__(self, sentences: Iterable[str], dimensions: int = 32) -> None:
        """Fit the corpus: its first 100,000 sentences. InputError: they hold too few words."""
        from sklearn.decomposition import TruncatedSVD  # takes a second
        from sklearn.feature_extraction.text import TfidfVectorizer

        known = list(islice(sentences, 100_000))
        self._weights = TfidfVectorizer(sublinear_tf=True, max_df=_COMMON, dtype=np.float32)
        try:
            counted = self._weights.fit_transform(known)
            most = min(dimensions, min(counted.shape) - 1)
            self._reduced = TruncatedSVD(most, algorithm="arpack", random_state=0).fit(counted)
        except ValueError:
            said = "the corpus has too few words for the teacher tf-idf"
            raise InputError(f"{said}: name an encoder as teacher") from None

    def encode(self, sentences: Sequence[str]) -> np.ndarray:
        """(n, D) float32, of any length; zero for a sentence without a known word."""
        return self._reduced.transform(self._weights.transform(sentences)).astype(np.float32)


class _Margin(Moments):
    def __init__(self, margin: float, teacher: Callable[[Sequence[str]], np.ndarray]) -> None:
        self.margin, self.teacher = margin, teacher
        self.known: Tensor | None = None

    def receive(self, batch: Batch) -> None:
        import torch

        self.known = torch.from_numpy(self.teacher(batch.sentences.texts))

    def turn(self, compared: Comparison) -> "Turn":
        import torch

        from fcse.losses import unit_rows

        # What is of no sentence has similarity 0 with all: the margin turns it in full.
        known = torch.cat([self.known, torch.zeros_like(self.known[:1])])
        known = unit_rows(known).to(compared.v.device)
        anchors, columns = known[compared.of[: len(compared.u)]], known[compared.of]

        def theirs(first: int, size: int) -> "Tensor":
            rows = anchors[first : first + size]
            sim = rows @ columns.T
            if compared.own_of is None:
                return sim
            own = known[compared.own_of[first : first + size]]
            return torch.cat([sim, (rows * own).sum(dim=1, keepdim=True)], dim=1)

        return turn(self.margin, theirs)


def turn(margin: float, teacher: "Callable[[int, int], Tensor] | Tensor | None" = None) -> "Turn":
    """s' of each negative with theta > margin, s of the others.

    At |s| = 1, where the slope ds'/ds = cos d - s / sqrt(1 - s^2) sin d with d = (1 - t) margin has
    no bound, it is taken as cos d.

    Args:
        margin: radians, 0 to below pi/2.
        teacher: the teacher's similarities in [-1, 1], taken as constants: (N, M) float, or a
            function of a block's first row and size; None: the teacher finds no pair alike.

    Returns: A turn for `losses.Columns`; it raises ValueError where the teacher's similarities have
    another shape."""
    require("margin", margin, below=math.pi / 2)

    def turned(sim: "Tensor", positives: "Tensor", first: int) -> "tuple[Tensor, Tensor]":
        import torch

        if callable(teacher):
            theirs = teacher(first, len(sim))
        else:
            theirs = torch.zeros_like(sim) if teacher is None else teacher[first : first + len(sim)]
        if theirs.shape != sim.shape:
            raise ValueError(
                "teacher must hold a similarity for each of sim's, "
                f"got {tuple(theirs.shape)} for {tuple(sim.shape)}"
            )
        angle = margin * (1 - theirs.detach().to(sim))
        angle = angle.masked_fill(positives | (sim >= math.cos(margin)), 0)
        cos, sin = angle.cos(), angle.sin()
        square = (1 - sim) * (1 + sim)
        # At |s| = 1 the root has no finite slope: the floor makes it 0, for autograd too.
        height = square.clamp_min(torch.finfo(sim.dtype).tiny).sqrt()
        slope = cos - sin * sim.detach() * (square > 0) / height.detach()
        return sim * cos + height * sin, slope

    return turned
