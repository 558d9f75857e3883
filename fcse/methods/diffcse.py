"""DiffCSE: the embedding must tell which tokens of its sentence were replaced.

Source: Chuang et al., NAACL 2022, "DiffCSE: Difference-based Contrastive Learning for Sentence
Embeddings" (arXiv 2204.10298), with their code (github.com/voidism/DiffCSE). Some of a sentence's
tokens are masked, a frozen generator fills them in, and a discriminator that is given the sentence
embedding says of each token whether it was replaced. It does so the better, the more the embedding
tells of the sentence that was edited. The loss is the contrastive one plus `detection` times this
one; `fcse.encoder.detection` has the discriminator, in the order of operations of their code.

As their script runs it for BERT: a head with batch normalisation, masks with the probability 0.3, a
generator (DistilBERT) that fills every position but the first, the mean over all positions, a
learning rate of 7e-6, and 2 epochs in batches of 64.
Where this differs from their code:
- Their generator is a masked language model trained at length. Where none is named, one is trained
  here, briefly, from the encoder and the corpus of the run. What share of held-out masked tokens it
  recovers is in the run's record.
- Both views of a sentence are edited and told apart, as there, with draws of this run's seed.
- For RoBERTa their padding becomes token 0 before the discriminator sees it. Here it stays padding.
- A sentence's tokens are cut and padded as in every run: on a CPU the encoder's own passes are in
  groups of similar length. The discriminator's is one pass, padded to the longest, as there."""

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from fcse.errors import InputError
from fcse.methods import Comparison, Method, Moments, Start
from fcse.objectives import require

if TYPE_CHECKING:
    from torch import Tensor

    from fcse.encoder.detection import Detection

TRAINED, UNIGRAMS = "trained", "unigrams"
"""Generators that need no model: one that is trained here, and draws from the corpus' words."""


@dataclass(frozen=True)
class DiffCSE(Method):
    """Settings of DiffCSE (Chuang et al. 2022)."""

    detection: float = 0.005
    """Weight of replaced-token detection beside the loss, >= 0; 0 turns it off."""
    generator: str = TRAINED
    """Masked language model that fills in tokens: trained, from the encoder and the corpus of the
    run; unigrams, which draws them from the corpus' words; a model folder or a hub name."""
    batch_norm: bool = True
    """Train with the authors' head: two linear layers, each with batch normalisation."""
    all_positions: bool = True
    """Count every position of the padded batch, as the authors do; else real tokens alone."""

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
        """Copy the encoder, load or train the generator; raise InputError where either fails."""
        from fcse import processes
        from fcse.encoder.detection import Detection, MaskedLM, Unigrams
        from fcse.encoder.generator import trained_masked_lm
        from fcse.encoder.sentence_encoder import BatchNormHead

        encoder, said = start.encoder, ""
        if self.batch_norm and processes.world().num_processes > 1:
            raise InputError(
                "diffcse.batch_norm needs a batch in one process: set diffcse.batch_norm to false"
            )
        if self.generator == UNIGRAMS:
            parts = start.corpus.dataset.iter(batch_size=1000)
            tokens = chain.from_iterable(part["token_ids"] for part in parts)
            generator = Unigrams(tokens, encoder.tokenizer.all_special_ids)
        elif self.generator == TRAINED:
            generator, right = trained_masked_lm(encoder, start.corpus)
            said = (
                f"the generator of diffcse recovers {100 * right['model']:.1f} % of held-out "
                f"masked tokens, a draw of unigrams {100 * right['unigrams']:.1f} %"
            )
        else:
            generator = MaskedLM(self.generator, encoder.tokenizer)
        found = Detection(encoder, generator, start.config.seed, self.all_positions)
        if self.batch_norm:
            encoder.head = BatchNormHead(encoder.backbone, start.config.seed).to(encoder.device)
        return _Beside(self.detection, found.to(encoder.device), said)

    def files(self) -> tuple[str, ...]:
        """The generator, where it is a model."""
        return () if self.generator in (TRAINED, UNIGRAMS) else (self.generator,)


class _Beside(Moments):
    def __init__(self, weight: float, module: "Detection", said: str) -> None:
        self.weight, self.module, self.said = weight, module, said

    def beside(self, compared: Comparison) -> "Tensor":
        import torch

        views = torch.cat([compared.u, compared.v[: len(compared.u)]])
        found, *_ = self.module(views, [*compared.token_ids, *compared.token_ids])
        return self.weight * found

    def remark(self) -> str:
        return self.said
