"""AdapACSE: an angular margin that a teacher sizes.

Source: KDMCSE, Nguyen et al., NAACL 2024 (arXiv 2403.17486), with their code. A margin makes a
negative look nearer than it is, so that more must be done; it is the larger, the less alike a
teacher finds the two sentences: with theta = arccos(s) > margin and the teacher's similarity t, a
negative's s gives way to s' = cos(theta - (1 - t) margin). As in their code s' jumps at theta =
margin.

Where this differs from the authors:
- Both of their scripts take a margin of 0.15.
- Theirs distils from CLIP and sizes the margin in its cross-modal terms; text against text gets
  the whole margin. Here the teacher sizes it in text.
- The teacher is an encoder read out by the mean over tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fcse.methods import Batch, Comparison, Method, Moments, Start
from fcse.objectives import require

if TYPE_CHECKING:
    from torch import Tensor

    from fcse.encoder.sentence_encoder import SentenceEncoder
    from fcse.losses import Turn


@dataclass(frozen=True)
class AdapACSE(Method):
    """Settings of AdapACSE (Nguyen et al. 2024)."""

    margin: float = 0.05
    """Radians, 0 to below pi/2, by which negatives the teacher finds unlike come closer; 0 turns it
    off."""
    teacher: str = "minilm"
    """Encoder whose mean readout sizes the margin: minilm, a model folder or a hub name."""

    label = "AdapACSE"
    switches = ("margin",)
    by_matrix = True

    def __post_init__(self) -> None:
        require("adap_acse.margin", self.margin, below=math.pi / 2)

    def begin(self, start: Start) -> Moments:
        """Load the teacher; raise InputError where it is not there."""
        from fcse.encoder.sentence_encoder import SentenceEncoder

        teacher = SentenceEncoder.from_pretrained(self.teacher, "mean").eval()
        return _Margin(self.margin, teacher.to(start.encoder.device))

    def files(self) -> tuple[str, ...]:
        """The teacher."""
        return (self.teacher,)


class _Margin(Moments):
    def __init__(self, margin: float, teacher: "SentenceEncoder") -> None:
        self.margin, self.teacher = margin, teacher
        self.known: Tensor | None = None

    def receive(self, batch: Batch) -> None:
        import torch

        from fcse import processes

        self.known = torch.from_numpy(processes.encode(self.teacher, batch.sentences.texts))

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

        theirs = teacher(first, len(sim)) if callable(teacher) else teacher
        if teacher is None:
            theirs = torch.zeros_like(sim)
        elif not callable(teacher):
            theirs = theirs[first : first + len(sim)]
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
