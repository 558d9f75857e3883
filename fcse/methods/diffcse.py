"""DiffCSE: the embedding must tell which tokens of its sentence were replaced.

Source: Chuang et al., NAACL 2022, "DiffCSE: Difference-based Contrastive Learning for Sentence
Embeddings" (arXiv 2204.10298), with their code (github.com/voidism/DiffCSE). A share of a
sentence's tokens is masked, a frozen generator fills them, and a discriminator that is given the
sentence embedding says of each token whether it was replaced. It does so the better, the more the
embedding tells of the sentence that was edited. The loss is the contrastive one plus `detection`
times this one; `fcse.encoder.detection` has the discriminator.

The authors' generator is DistilBERT, their learning rate 7e-6, over 2 epochs in batches of 64.
Where this differs from their code:
- Without a generator, tokens are drawn from the corpus' unigrams, which is easier to see through.
- The sentence embedding replaces the first token's vector ahead of the embedding layer's
  normalisation and dropout. Theirs replaces what comes out of that layer.
- Their head on the sentence embedding has batch normalisation. Here the encoder keeps its own.
- They mask each token by itself with the probability 0.3, and of those a tenth becomes a random
  token and a tenth stays. Here exactly that share is masked, always.
- Their generator fills every position but the first, here the masked ones.
- Their mean is over all positions, the first and the padding among them. Here it is over the real
  tokens behind the first."""

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from fcse.errors import InputError
from fcse.methods import Comparison, Method, Moments, Start
from fcse.objectives import require

if TYPE_CHECKING:
    from torch import Tensor

    from fcse.encoder.detection import Detection


@dataclass(frozen=True)
class DiffCSE(Method):
    """Settings of DiffCSE (Chuang et al. 2022)."""

    detection: float = 0.005
    """Weight of replaced-token detection beside the loss, >= 0; 0 turns it off."""
    generator: str | None = None
    """Masked language model that replaces tokens, a model folder or a hub name; None draws them
    from the corpus' unigrams."""

    label = "DiffCSE"
    switches = ("detection",)

    def __post_init__(self) -> None:
        require("diffcse.detection", self.detection)

    def check(self, config: Any) -> None:
        """Raise InputError beside micro-batches: tokens are replaced in a batch as a whole."""
        if config.micro_batch_size:
            raise InputError(
                "diffcse.detection needs a batch in one pass: leave out micro_batch_size, or set "
                "diffcse.detection to 0"
            )

    def begin(self, start: Start) -> Moments:
        """Copy the encoder, load the generator; raise InputError where either does not go."""
        from fcse.encoder.detection import Detection, MaskedLM, Unigrams

        encoder = start.encoder
        if self.generator is not None:
            generator = MaskedLM(self.generator, encoder.tokenizer)
        else:
            parts = start.corpus.dataset.iter(batch_size=1000)
            tokens = chain.from_iterable(part["token_ids"] for part in parts)
            generator = Unigrams(tokens, encoder.tokenizer.all_special_ids)
        found = Detection(encoder, generator, seed=start.config.seed)
        return _Beside(self.detection, found.to(encoder.device))

    def files(self) -> tuple[str, ...]:
        """The generator."""
        return (self.generator,) if self.generator else ()


class _Beside(Moments):
    def __init__(self, weight: float, module: "Detection") -> None:
        self.weight, self.module = weight, module

    def beside(self, compared: Comparison) -> "Tensor":
        import torch

        views = torch.cat([compared.u, compared.v[: len(compared.u)]])
        found, *_ = self.module(views, [*compared.token_ids, *compared.token_ids])
        return self.weight * found
