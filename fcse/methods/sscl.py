"""SSCL: vectors of lower layers join as negatives.

Source: Chen et al., ACL 2023 (arXiv 2305.06154), with their code. The layers of an encoder grow
alike, so that the last one says little that the one below does not; pushing an anchor away from
the lower layers' vectors of both views makes it say more. The loss is the mean of the plain one
and of that with those vectors among the negatives, after the same head. Each layer brings 2N
columns, those of the anchor's own sentence among them.

Their scripts take two layers, batches of 64, a learning rate of 3e-5 and 32 tokens.
Where this differs from their code:
- Their scripts pool by the mean over tokens, here a run's own pooling is taken, for the lower
  layers too.
- Negatives that are the anchor's own sentence again are left out of the plain columns, as in every
  run (`mask_duplicates`). They keep them.
- With several processes, columns of the others carry gradients. Theirs do not."""

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

    layers: int = 2
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
