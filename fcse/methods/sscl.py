"""SSCL: vectors of lower layers join as negatives.

Source: Chen et al., ACL 2023 (arXiv 2305.06154), with their code. The layers of an encoder grow
alike, so that the last one says little that the one below does not; pushing an anchor away from
the lower layers' vectors of both views makes it say more. The loss is the mean of the plain one
and of that with those vectors among the negatives, after the same head.

Where this differs from the authors:
- They take two layers by default, here it is one.
- Their scripts pool by the mean, here a run's own pooling is taken."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fcse.errors import InputError
from fcse.methods import Comparison, Loss, Method, Moments, Start
from fcse.objectives import require

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SSCL(Method):
    """Settings of SSCL (Chen et al. 2023)."""

    layers: int = 1
    """Layers below the last whose vectors join as negatives, >= 0; 0 turns it off."""

    label = "SSCL"
    switches = ("layers",)

    def __post_init__(self) -> None:
        require("sscl.layers", self.layers)

    def begin(self, start: Start) -> Moments:
        """Raise InputError where the encoder has fewer layers."""
        most = start.encoder.backbone.config.num_hidden_layers - 1
        if self.layers > most:
            raise InputError(
                f"sscl.layers must be at most {most}, those below the last of this encoder, "
                f"got {self.layers}"
            )
        return _LowerLayers(self.layers)


class _LowerLayers(Moments):
    def __init__(self, layers: int) -> None:
        self.layers = layers

    def loss(self, value: Loss, compared: Comparison) -> "Tensor":
        # Another method may have asked for more layers; those of each view come from the last down.
        views = compared.lower.unflatten(1, (2, -1))[:, :, : self.layers]
        of = compared.place().repeat_interleave(2 * self.layers)
        extended = compared.more(views.flatten(0, 2), of, always=True)
        return (value(compared) + value(extended)) / 2
