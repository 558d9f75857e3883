"""SparseCSE: what contributes least to alignment and uniformity is removed, then training repeats.

Source: the abstract of An, Zhang and Song, arXiv 2311.03881: a trained encoder holds parameters
that harm its embeddings; each is scored by alignment and uniformity, the lowest are removed. The
formula is that of StarK, by two of its authors (arXiv 2210.03923, github.com/GeneZC/StarK), hence
"after StarK's scoring": with a mask of 1 on every attention head and every neuron between the
layers, |d score / d mask| is summed over batches, divided by its norm over the layer, and the two
scores are joined half and half. As in StarK, training then starts again from the first weights,
with the same order of sentences, and what was removed is 0 after every step.

The run without this method comes first, and lies beside. What is this kit's own:
- The scores. Alignment: the mean of |u - v|^2 over two dropout views of a sentence. Uniformity: the
  logarithm of the mean of exp(-2 |x - y|^2) over pairs, without dropout. Both without the head.
- They are of sentences of the corpus. StarK's are of a dev set, which here only chooses settings.
- The share removed, the signed score, single weights, and the controls."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from fcse.errors import InputError
from fcse.methods import Method, Moments, Start
from fcse.objectives import require, require_share

if TYPE_CHECKING:
    from torch import Tensor

Remove = Literal["lowest", "highest", "random", "magnitude"]
"""What goes: the lowest contribution; or, as a control, the highest, any, or the smallest."""

Scores = dict[tuple[str, str], "Tensor"]
"""Kind of part and name of a weight -> a score for each of its parts, in order."""


@dataclass(frozen=True)
class SparseCSE(Method):
    """Settings of SparseCSE (An et al. 2023), after StarK's scoring."""

    sparsity: float = 0.1
    """Share removed, of heads and of neurons apart, 0 to below 1; 0 turns it off."""
    structured: bool = True
    """Remove attention heads and neurons; else single weights of linear layers."""
    remove: Remove = "lowest"
    """Which: lowest contribution, or a control: highest, random, magnitude (smallest weights)."""
    balance: float = 0.5
    """Share of the alignment score in the contribution, 0 to 1; the rest is uniformity's."""
    signed: bool = False
    """Rate by what a removal does to the scores, lowest where it betters them; else by its size."""
    batches: int = 8
    """Batches of the corpus that are scored, >= 1."""

    label = "SparseCSE after StarK's scoring"
    switches = ("sparsity",)

    def __post_init__(self) -> None:
        require("sparse_cse.sparsity", self.sparsity, below=1)
        require_share("sparse_cse.balance", self.balance)
        require("sparse_cse.batches", self.batches, 1)
        if self.remove not in get_args(Remove):
            choices = ", ".join(get_args(Remove))
            raise InputError(f"unknown sparse_cse.remove {self.remove!r}: choose from {choices}")

    def begin(self, start: Start) -> Moments:
        """Train the dense run, or load it, and score it; InputError: no encoder of BERT's kind."""
        parts(start.encoder, self.structured)  # refused before anything is trained
        config = start.config
        others = tuple(method for method in config.methods if method.key != self.key)
        dense = replace(config, methods=others, output=None)
        dense = replace(dense, output=config.folder.parent / dense.run_name)
        encoder = start.train(dense).encoder.to(start.encoder.device)
        count = min(self.batches * config.batch_size, len(start.corpus))
        rows = np.random.default_rng((6, config.seed)).permutation(len(start.corpus))[:count]
        token_ids = start.corpus.batch(rows)[1]
        batches = [token_ids[i :: self.batches] for i in range(min(self.batches, count // 2))]
        kept = masks(contributions(encoder, batches, self, config.seed), self.sparsity)
        return _Removed(start.encoder, kept)


class _Removed(Moments):
    def __init__(self, encoder: Any, kept: Scores) -> None:
        self.encoder, self.kept = encoder, kept
        prune(encoder, kept)

    def after_step(self, step: int) -> None:
        prune(self.encoder, self.kept)

    def remark(self) -> str:
        gone: Counter[str] = Counter()
        of: Counter[str] = Counter()
        for (kind, _), mask in self.kept.items():
            gone[kind] += int((~mask).sum())
            of[kind] += len(mask)
        return (
            f"sparse_cse removed {', '.join(f'{gone[kind]} of {of[kind]} {kind}' for kind in of)}"
        )


class Part(NamedTuple):
    """A weight matrix whose columns, `wide` at a time, belong to parts; 0: each entry is one."""

    kind: str
    name: str
    weight: "Tensor"
    wide: int


def parts(encoder: Any, structured: bool) -> list[Part]:
    """What can be removed of an encoder: heads and neurons by what reads them, or single weights.

    InputError: heads and neurons of an encoder that is not of BERT's kind."""
    from torch import nn

    from fcse.encoder.packing import is_bert

    backbone = encoder.backbone
    if not structured:
        linear = {name: m for name, m in backbone.named_modules() if type(m) is nn.Linear}
        return [
            Part("weights", f"{name}.weight", module.weight, 0)
            for name, module in linear.items()
            if not name.startswith("pooler")  # which no readout reads
        ]
    if not is_bert(backbone):
        raise InputError(
            f"heads and neurons are known of encoders of BERT's kind, not of "
            f"{backbone.config.model_type}: set sparse_cse.structured to false"
        )
    head = backbone.config.hidden_size // backbone.config.num_attention_heads
    found = []
    for i, layer in enumerate(backbone.encoder.layer):
        at = f"encoder.layer.{i}"
        read = layer.attention.output.dense.weight
        found.append(Part("heads", f"{at}.attention.output.dense.weight", read, head))
        found.append(Part("neurons", f"{at}.output.dense.weight", layer.output.dense.weight, 1))
    return found


def alignment_score(u: "Tensor", v: "Tensor") -> "Tensor":
    """The mean of |u - v|^2 over n pairs of views on the unit sphere, (n, D) float each -> ()."""
    from fcse.losses import unit_rows

    return (unit_rows(u) - unit_rows(v)).square().sum(dim=1).mean()


def uniformity_score(x: "Tensor") -> "Tensor":
    """log mean exp(-2 |x - y|^2) over the pairs of n >= 2 rows on the unit sphere, (n, D) -> ()."""
    from fcse.losses import unit_rows

    cosines = (unit_rows(x) @ unit_rows(x).T)[np.triu_indices(len(x), 1)]
    return (4 * cosines - 4).exp().mean().log()


def contributions(
    encoder: Any, batches: Sequence[Sequence[Sequence[int]]], settings: SparseCSE, seed: int
) -> Scores:
    """What each part contributes, by what is to go first; the encoder is left as it was.

    A mask on the inputs of a weight matrix has the gradient sum_rows W * dL/dW, over the columns of
    its part. batches: token ids of at least two sentences each. seed: of dropout and of the random
    control."""
    import torch

    encoder, generator = copy.deepcopy(encoder), torch.Generator().manual_seed(seed)
    found = parts(encoder, settings.structured)
    of_size = [_summed(part, part.weight.detach().square()) for part in found]
    if settings.remove == "random":
        of_size = [torch.rand(x.shape, generator=generator) for x in of_size]
    if settings.remove in ("random", "magnitude"):
        return {part[:2]: x.cpu() for part, x in zip(found, of_size, strict=True)}
    sums = [[0 * x for x in of_size] for _ in range(2)]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for token_ids in batches:
            features = encoder.features(token_ids)
            encoder.train()
            views = [encoder.pool(features) for _ in range(2)]
            encoder.eval()
            values = alignment_score(*views), uniformity_score(encoder.pool(features))
            for value, sum_ in zip(values, sums, strict=True):
                gradients = torch.autograd.grad(value, [part.weight for part in found])
                for part, gradient, x in zip(found, gradients, sum_, strict=True):
                    of_part = _summed(part, part.weight.detach() * gradient)
                    # Without a part the score changes by -d score / d mask; both are better low.
                    x += -of_part if settings.signed else of_part.abs()
    shares, scores = (settings.balance, 1 - settings.balance), {}
    for part, *both in zip(found, *sums, strict=True):
        # The smallest number is StarK's.
        joined = sum(share * x / (x.norm() + 1e-7) for share, x in zip(shares, both, strict=True))
        scores[part[:2]] = (-joined if settings.remove == "highest" else joined).cpu()
    return scores


def _summed(part: Part, of_weights: "Tensor") -> "Tensor":
    """A number for each part from one for each weight, one row."""
    if not part.wide:
        return of_weights.flatten()
    return of_weights.sum(dim=0).unflatten(0, (-1, part.wide)).sum(dim=1)


def masks(scores: Scores, sparsity: float) -> Scores:
    """Which parts stay, bool: of each kind, over all layers, the lowest share is removed.

    floor(sparsity * count) of a kind go, ties by their order; more where the share is larger, and
    then those that went before are among them."""
    import torch

    kept: Scores = {}
    for kind in dict.fromkeys(kind for kind, _ in scores):
        of_kind = {at: x for at, x in scores.items() if at[0] == kind}
        joined = torch.cat([*of_kind.values()])
        flat = torch.ones_like(joined, dtype=torch.bool)
        flat[joined.argsort(stable=True)[: int(sparsity * len(joined))]] = False
        kept |= zip(of_kind, flat.split([*map(len, of_kind.values())]), strict=True)
    return kept


def prune(encoder: Any, kept: Scores) -> None:
    """Set to 0 what reads the parts that do not stay: they are then as if they were not there."""
    import torch

    structured = {kind for kind, _ in kept} != {"weights"}
    with torch.no_grad():
        for part in parts(encoder, structured):
            mask = kept[part[:2]].to(part.weight.device)
            if part.wide:
                part.weight[:, ~mask.repeat_interleave(part.wide)] = 0
            else:
                part.weight[~mask.view(part.weight.shape)] = 0


def mask_overlap(a: Scores, b: Scores) -> float:
    """Jaccard's index of what two masks remove: in both over in either, 0 to 1; 1 for nothing."""
    both = sum(int((~a[key] & ~b[key]).sum()) for key in a)
    either = sum(int((~a[key] | ~b[key]).sum()) for key in a)
    return both / either if either else 1.0
