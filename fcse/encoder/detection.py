"""A second task for an encoder: tell replaced tokens from original ones, given the embedding.

What DiffCSE adds to the loss (Chuang et al. 2022), with the generators that replace the tokens;
`fcse.methods.diffcse` names the source and each point where this differs from it."""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

from fcse.data import hub_reachable, is_folder
from fcse.encoder import speed
from fcse.encoder.sentence_encoder import SentenceEncoder, linear, loading
from fcse.errors import InputError

MASK_SHARE = 0.3
"""Share of a sentence's tokens that is masked, as the authors set it."""

TokenGenerator = Callable[[Tensor, Tensor], Tensor]
"""Fills in masked tokens: ids, (n, L) int64, padded and with the mask's id at k positions, and
those positions, (n, L) bool, give k tokens, (k,) int64, row by row."""


class MaskedLM:
    """A frozen masked language model: each masked token becomes the most likely one.

    It is no part of the module that uses it: its weights are neither trained nor saved with a run,
    and it runs without dropout, on the device of what it is given."""

    def __init__(self, name_or_path: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Load a model folder or a model of the hub in float32; no code that comes with it is run.

        InputError: no such model, no language-model head in its weights, a pickle that holds more
        than tensors, or another vocabulary than that of `tokenizer`, the encoder's."""
        path, name = str(name_or_path), f"masked language model {str(name_or_path)!r}"
        local = is_folder(path) or not hub_reachable()
        where = {"local_files_only": local, "trust_remote_code": False}
        with loading(name, "a model folder"):
            theirs = AutoTokenizer.from_pretrained(path, **where).get_vocab()
            self.model, loaded = AutoModelForMaskedLM.from_pretrained(
                path, dtype=torch.float32, output_loading_info=True, **where
            )
        # The library would fill these at random and say so in a warning only.
        if loaded["missing_keys"]:
            raise InputError(
                f"{name} lacks weights ({min(loaded['missing_keys'])}): give one that was saved "
                "with its language-model head"
            )
        vocabulary = tokenizer.get_vocab()
        self._tokens, self._pad_id = len(vocabulary), tokenizer.pad_token_id
        if theirs != vocabulary or self.model.config.vocab_size < self._tokens:
            raise InputError(
                f"{name} has another vocabulary than the encoder: give one that shares the "
                "encoder's tokenizer"
            )
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, token_ids: Tensor, where: Tensor) -> Tensor:
        """The most likely tokens, see `TokenGenerator`."""
        self.model.to(token_ids.device)
        attention_mask = (token_ids != self._pad_id).long()
        scores = self.model(input_ids=token_ids, attention_mask=attention_mask).logits[where]
        # Columns beyond the vocabulary, there to round its size up, stand for no token.
        return scores[:, : self._tokens].argmax(1)


class Unigrams:
    """A stand-in where no masked language model is at hand: tokens drawn by their frequency.

    Not what the authors do. A draw knows nothing of the sentence around it, so replacements are
    easier to detect than a language model's, and fewer of them are the token that was there."""

    def __init__(self, token_ids: Iterable[Sequence[int]], special_ids: Collection[int]) -> None:
        """Count a corpus' tokens but `special_ids`; an `InputError` where there is none."""
        counts = Counter(chain.from_iterable(token_ids))
        tokens = sorted(counts.keys() - set(special_ids))
        if not tokens:
            raise InputError("the corpus has no token to draw replacements from: give more text")
        self._tokens = torch.tensor(tokens)
        self._ends = torch.tensor([counts[token] for token in tokens]).cumsum(0)

    def __call__(self, token_ids: Tensor, where: Tensor) -> Tensor:
        """Independent draws, see `TokenGenerator`, from torch's global generator on the CPU."""
        draws = torch.randint(int(self._ends[-1]), (int(where.sum()),))
        return self._tokens[torch.searchsorted(self._ends, draws, right=True)].to(token_ids.device)


def mask(
    token_ids: Tensor, share: float, special_ids: Collection[int], mask_id: int
) -> tuple[Tensor, Tensor]:
    """Mask a share of each sentence's tokens, drawn without replacement.

    Of a sentence's c tokens that are not special, round(share * c) are masked (halves go to the
    even number), and at least one where c > 0. Drawn from torch's global generator on the CPU.

    Args:
        token_ids: (n, L) int64, padded.
        share: in (0, 1], else a `ValueError`.
        special_ids: never masked; the padding's id is among them.
        mask_id: stands in for a masked token.

    Returns: The masked ids, (n, L) int64, and which of them are masked, (n, L) bool."""
    if not 0 < share <= 1:
        raise ValueError(f"share must lie above 0 and at most at 1, got {share}")
    special = torch.tensor(list(special_ids), dtype=torch.int64, device=token_ids.device)
    maskable = ~torch.isin(token_ids, special)
    count = maskable.sum(1, keepdim=True)
    wanted = (share * count.double()).round().clamp(min=1).minimum(count)
    draws = torch.rand(token_ids.shape).to(token_ids.device)
    order = draws.masked_fill(~maskable, 2).argsort(dim=1, stable=True)
    which = order.argsort(dim=1) < wanted
    return token_ids.masked_fill(which, mask_id), which


class Detection(nn.Module):
    """Tells replaced tokens from original ones, given the sentence embedding.

    Made before training starts: its transformer is a copy of the encoder's backbone as it is then.
    In training mode it has the backbone's dropout. Masks, drawn replacements and dropout all come
    from torch's global generators, so that a run whose generators are restored goes on as it was.

    Attributes:
        discriminator: the copy, without a pooler; trained, and of no use after training.
        head: Linear from a token's last hidden state to one logit, replaced against original. The
            authors' cross-entropy over the two is the same function of the logits' difference.
        token_generator: fills in the masked tokens, a `MaskedLM` or `Unigrams`."""

    def __init__(
        self, encoder: SentenceEncoder, token_generator: TokenGenerator, seed: int = 0
    ) -> None:
        """Copy the backbone of an encoder that is about to be trained; `seed` is the head's.

        InputError: a tokenizer without a mask token, or a backbone whose input vectors are not as
        wide as its sentence embeddings."""
        super().__init__()
        kind, tokenizer = encoder.backbone.config.model_type, encoder.tokenizer
        if tokenizer.mask_token_id is None:
            raise InputError(
                f"the tokenizer of this encoder ({kind}) has no mask token: give an encoder that "
                "was trained as a masked language model"
            )
        inputs = encoder.backbone.get_input_embeddings().embedding_dim
        if inputs != encoder.dimension:
            raise InputError(
                f"this encoder ({kind}) takes input vectors of {inputs} numbers and gives sentence "
                f"embeddings of {encoder.dimension}, which cannot stand in for one: give one where "
                "both are the same, such as BERT"
            )
        self.discriminator = copy.deepcopy(encoder.backbone)
        self.head = linear(encoder.backbone, 1, seed)
        self.token_generator = token_generator
        self._special_ids = tokenizer.all_special_ids
        self._mask_id, self._pad_id = tokenizer.mask_token_id, tokenizer.pad_token_id

    def forward(
        self, sentence_embedding: Tensor, token_ids: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Binary cross-entropy of telling the replaced tokens of a batch, and what it is made of.

        The mean is over the T tokens of the batch behind each sentence's first: the closing special
        token counts, padding and the position that holds the embedding do not. A token that was
        replaced by itself counts as original, as in ELECTRA (Clark et al. 2020, section 2).

        Args:
            sentence_embedding: (n, D) float, else a `ValueError`; gradients flow into it.
            token_ids: the n sentences it was made of, from `SentenceEncoder.tokenize`.

        Returns: The loss, () float32 (float64 in a float64 module); the logits, (T,) of the same
        dtype, sentence after sentence, above 0 where replaced is the likelier, a part of the graph;
        and (T,) bool, which were replaced."""

        def behind_first(sentences: Sequence[Sequence[int]]) -> Tensor:
            return torch.tensor([token for ids in sentences for token in ids[1:]])

        edited = self.edit(token_ids)
        logits = self.logits(sentence_embedding, edited)
        replaced = (behind_first(edited) != behind_first(token_ids)).to(logits.device)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, replaced.to(logits.dtype))
        return loss, logits, replaced

    def edit(self, token_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """The sentences with a share of their tokens masked and filled in by the generator."""
        rows = [torch.tensor(ids) for ids in token_ids]
        padded = pad_sequence(rows, batch_first=True, padding_value=self._pad_id)
        masked, which = mask(padded, MASK_SHARE, self._special_ids, self._mask_id)
        device = self.head.weight.device
        padded[which] = self.token_generator(masked.to(device), which.to(device)).cpu()
        return [line[: len(ids)].tolist() for line, ids in zip(padded, token_ids, strict=True)]

    def logits(self, sentence_embedding: Tensor, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """How much each token behind each sentence's first looks replaced.

        (T,) float32 (float64 in a float64 module). The embedding of the original sentence, (n, D)
        float, takes the place of the first token's input vector, which is not read; `token_ids` are
        n sentences as `edit` gives them. Embeddings of another shape are a `ValueError`."""
        expected = (len(token_ids), self.head.in_features)
        if sentence_embedding.shape != expected:
            raise ValueError(
                f"sentence_embedding must be {expected}, got {tuple(sentence_embedding.shape)}"
            )
        by_row: dict[int, Tensor] = {}
        embedding = self.discriminator.get_input_embeddings()
        device = self.head.weight.device
        for rows, features in speed.length_groups(token_ids, embedding, device):
            tokens = features["inputs_embeds"]
            first = sentence_embedding[rows].to(tokens).unsqueeze(1)
            features["inputs_embeds"] = torch.cat([first, tokens[:, 1:]], dim=1)
            logits = self.head(self.discriminator(**features).last_hidden_state).squeeze(2)
            for row, line in zip(rows, logits, strict=True):
                by_row[row] = line[1 : len(token_ids[row])]
        flat = torch.cat([by_row[row] for row in range(len(token_ids))])
        return flat.to(torch.promote_types(flat.dtype, torch.float32))


def practise(
    detection: Detection,
    sentence_embedding: Tensor,
    token_ids: Sequence[Sequence[int]],
    steps: int,
    learning_rate: float,
) -> None:
    """Train a discriminator alone (AdamW), on embeddings that stay; it ends in evaluation mode."""
    optimizer = torch.optim.AdamW(detection.parameters(), learning_rate)
    detection.train()
    for _ in range(steps):
        optimizer.zero_grad()
        detection(sentence_embedding.detach(), token_ids)[0].backward()
        optimizer.step()
    detection.eval()
