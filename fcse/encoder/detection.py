"""A second task for an encoder: tell replaced tokens from original ones, given the embedding.

What DiffCSE adds to the loss (Chuang et al. 2022), in the order of operations of its authors' code;
`fcse.methods.diffcse` names the source and each point where this differs from it."""

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
"""Probability of each token to be chosen for masking, as the authors set it."""

TokenGenerator = Callable[[Tensor, Tensor], Tensor]
"""Fills in tokens: ids, (n, L) int64, padded and with chosen ones masked, and which were chosen,
(n, L) bool, give ids, (n, L) int64."""


class MaskedLM:
    """A frozen masked language model: every token becomes the most likely one, masked or not.

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
        scores = self.model(input_ids=token_ids, attention_mask=attention_mask).logits
        # Columns beyond the vocabulary, there to round its size up, stand for no token.
        return scores[..., : self._tokens].argmax(2)


class Unigrams:
    """A stand-in for a masked language model: chosen tokens drawn by their frequency.

    Not what the authors do. A draw knows nothing of the sentence around it, so replacements are
    easier to detect than a language model's, and fewer of them are the token that was there. Tokens
    that were not chosen stay."""

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
        drawn = self._tokens[torch.searchsorted(self._ends, draws, right=True)]
        return token_ids.masked_scatter(where, drawn.to(token_ids.device))


def mask(
    token_ids: Tensor, share: float, special_ids: Collection[int], mask_id: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """Choose tokens at random and mask most of them, as masked language models are trained.

    Each token that is not special is chosen by itself with the probability `share`. Of the chosen
    ones 80 % become the mask, 10 % any token of the vocabulary, 10 % stay. Drawn from torch's
    global generator on the CPU.

    token_ids: (n, L) int64, padded. share: in (0, 1], else a `ValueError`. special_ids: never
    chosen; the padding's id is among them. mask_id: stands in for a masked token. tokens: size of
    the vocabulary.

    Returns: The masked ids, (n, L) int64, and which of them were chosen, (n, L) bool."""
    if not 0 < share <= 1:
        raise ValueError(f"share must lie above 0 and at most at 1, got {share}")
    device = token_ids.device
    special = torch.tensor(list(special_ids), dtype=torch.int64, device=device)
    drawn, how = torch.rand(2, *token_ids.shape).to(device)
    chosen = (drawn < share) & ~torch.isin(token_ids, special)
    anything = torch.randint(tokens, token_ids.shape).to(device)
    changed = torch.where(how < 0.8, mask_id, torch.where(how < 0.9, anything, token_ids))
    return torch.where(chosen, changed, token_ids), chosen


class Detection(nn.Module):
    """Tells replaced tokens from original ones, given the sentence embedding.

    Made before training starts: its transformer is a copy of the encoder's backbone as it is then.
    In training mode it has the backbone's dropout. Masks, drawn replacements and dropout all come
    from torch's global generators, so that a run whose generators are restored goes on as it was.

    Attributes:
        discriminator: the copy, without a pooler; trained, and of no use after training.
        head: Linear from a token's last hidden state to two classes, original and replaced.
        token_generator: fills in tokens, a `MaskedLM` or `Unigrams`.
        all_positions: whether every position counts, the first and the padding too, as the authors
            have it; else the real tokens behind the first."""

    def __init__(
        self,
        encoder: SentenceEncoder,
        token_generator: TokenGenerator,
        seed: int = 0,
        all_positions: bool = True,
    ) -> None:
        """Copy the backbone of an encoder that is about to be trained; `seed` is the head's.

        InputError: a tokenizer without a mask token, a backbone without an embedding layer that
        comes first, or one whose vectors are not as wide as its sentence embeddings."""
        super().__init__()
        kind, tokenizer = encoder.backbone.config.model_type, encoder.tokenizer
        if tokenizer.mask_token_id is None:
            raise InputError(
                f"the tokenizer of this encoder ({kind}) has no mask token: give an encoder that "
                "was trained as a masked language model"
            )
        inputs = encoder.backbone.get_input_embeddings().embedding_dim
        if inputs != encoder.dimension or not hasattr(encoder.backbone, "embeddings"):
            raise InputError(
                f"this encoder ({kind}) takes input vectors of {inputs} numbers and gives sentence "
                f"embeddings of {encoder.dimension}, which cannot stand in for one: give one where "
                "both are the same, such as BERT"
            )
        self.discriminator = copy.deepcopy(encoder.backbone)
        self.head = linear(encoder.backbone, 2, seed)
        self.token_generator = token_generator
        self.all_positions = all_positions
        self._special_ids, self._tokens = tokenizer.all_special_ids, len(tokenizer)
        self._mask_id, self._pad_id = tokenizer.mask_token_id, tokenizer.pad_token_id

    def forward(
        self, sentence_embedding: Tensor, token_ids: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cross-entropy of telling the replaced tokens of a batch, and what it is made of.

        The mean is over T positions, see `all_positions`. A token that was replaced by itself
        counts as original, as in ELECTRA (Clark et al. 2020, section 2).

        Args:
            sentence_embedding: (n, D) float, else a `ValueError`; gradients flow into it.
            token_ids: the n sentences it was made of, from `SentenceEncoder.tokenize`.

        Returns: The loss, () float32 (float64 in a float64 module); the logits of replaced less
        those of original, (T,) of the same dtype, row by row, a part of the graph; and (T,) bool,
        which were replaced."""
        edited = self.edit(token_ids)
        before = self._padded(token_ids)
        replaced = (self._padded(edited) != before).to(self.head.weight.device)
        logits = self.logits(sentence_embedding, edited)
        if not self.all_positions:
            lengths = torch.tensor([[len(ids)] for ids in token_ids], device=logits.device)
            places = torch.arange(replaced.shape[1], device=logits.device)
            counted = (places > 0) & (places < lengths)
            logits, replaced = logits[counted], replaced[counted]
        logits, replaced = logits.reshape(-1, 2), replaced.reshape(-1)
        loss = nn.functional.cross_entropy(logits, replaced.long())
        return loss, logits[:, 1] - logits[:, 0], replaced

    def edit(self, token_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        """The sentences as the generator fills them in; the first token of each stays."""
        padded = self._padded(token_ids)
        masked, chosen = mask(padded, MASK_SHARE, self._special_ids, self._mask_id, self._tokens)
        device = self.head.weight.device
        filled = self.token_generator(masked.to(device), chosen.to(device)).cpu()
        filled[:, 0] = padded[:, 0]
        return [line[: len(ids)].tolist() for line, ids in zip(filled, token_ids, strict=True)]

    def _padded(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        rows = [torch.tensor(ids) for ids in token_ids]
        return pad_sequence(rows, batch_first=True, padding_value=self._pad_id)

    def logits(self, sentence_embedding: Tensor, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """What each position of n padded sentences looks like: (n, L, 2), original and replaced.

        Float32 (float64 in a float64 module); where not all positions count, those of the padding
        are 0. The embedding of the original sentence, (n, D) float, takes the place of what comes
        out of the embedding layer at the first token, behind its normalisation and dropout;
        `token_ids` are as `edit` gives them. Embeddings of another shape are a `ValueError`."""
        expected, given = (len(token_ids), self.head.in_features), tuple(sentence_embedding.shape)
        if given != expected:
            raise ValueError(f"sentence_embedding must be {expected}, got {given}")
        device, longest = self.head.weight.device, max(map(len, token_ids))
        words = self.discriminator.get_input_embeddings()
        if self.all_positions:
            padded = self._padded(token_ids).to(device)
            lengths = torch.tensor([[len(ids)] for ids in token_ids], device=device)
            mask = (torch.arange(longest, device=device) < lengths).long()
            groups = iter([([*range(len(padded))], {"input_ids": padded, "attention_mask": mask})])
        else:
            groups = speed.length_groups(token_ids, words, device)
        by_row: dict[int, Tensor] = {}
        for rows, features in groups:
            with self._first(sentence_embedding[rows]):
                logits = self.head(self.discriminator(**features).last_hidden_state)
            for row, line in zip(rows, logits, strict=True):
                by_row[row] = nn.functional.pad(line, (0, 0, 0, longest - len(line)))
        found = torch.stack([by_row[row] for row in range(len(token_ids))])
        return found.to(torch.promote_types(found.dtype, torch.float32))

    @contextmanager
    def _first(self, vectors: Tensor) -> Iterator[None]:
        """Within this context these vectors come out of the embedding layer at the first token."""

        def replaced(_: nn.Module, __: object, embedded: Tensor) -> Tensor:
            return torch.cat([vectors.to(embedded).unsqueeze(1), embedded[:, 1:]], dim=1)

        hook = self.discriminator.embeddings.register_forward_hook(replaced)
        try:
            yield
        finally:
            hook.remove()


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
