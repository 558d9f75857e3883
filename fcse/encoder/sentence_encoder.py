"""Backbone, pooling and the training-only head: sentences in, embeddings out."""

import hashlib
import inspect
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from fcse.data import MINILM, hub_reachable, is_file, is_folder
from fcse.encoder import speed
from fcse.encoder.layout import layers_read, read_layout, write_layout
from fcse.encoder.packing import packed, packs
from fcse.encoder.pooling import Pooling
from fcse.encoder.precision import Precision, resolve_precision
from fcse.errors import InputError, first_line

_HEAD_FILE = "head.safetensors"
_POOLINGS = ", ".join(get_args(Pooling))
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


class SentenceEncoder(nn.Module):
    """A Hugging Face encoder, a pooling, and the head that exists in training only.

    Attributes:
        backbone, tokenizer: the encoder, without its own pooler.
        pooling: how token vectors become a sentence vector, see `pool`.
        head: Linear -> tanh on the pooled vector, as in SimCSE (Gao et al. 2021, section 6.3), or
            a `BatchNormHead`: used by `forward` for "cls" only, dropped by `encode`.
        max_length: the longest input in tokens that the backbone takes."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: Pooling,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise InputError(f"unknown pooling {pooling!r}: choose from {_POOLINGS}")
        backbone.pooler = None
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.head = nn.Sequential(linear(backbone, self.dimension, seed), nn.Tanh())
        self.max_length = min(tokenizer.model_max_length, _positions(backbone))
        self._inputs = set(inspect.signature(backbone.forward).parameters)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, pooling: Pooling | None = None, seed: int = 0
    ) -> Self:
        """Load an encoder in float32, on the CPU, in evaluation mode.

        Args:
            name_or_path: "minilm" (packaged all-MiniLM-L6-v2, its checksum verified), a run
                folder, a model folder, also one in the layout of sentence-transformers, or the
                name of a model on the hub.
            pooling: None means what the model declares in that layout, and "cls" where it declares
                nothing; for "minilm" the untuned "cls", whatever it was published with.
            seed: of the head, where the folder brings none.

        InputError: unknown pooling, no such model, no weights in the folder, or altered packaged
        weights."""
        path, name = str(name_or_path), repr(str(name_or_path))
        if name_or_path == "minilm":
            path, pooling = str(MINILM.locate().parent), pooling or "cls"
        if is_file(Path(path) / "run.json"):
            path = str(Path(path) / "model")
        folder = is_folder(path)
        local = folder or not hub_reachable()
        with loading(f"encoder {name}", "minilm, a model folder"):
            subfolder, declared = read_layout(path, local)
            within = Path(path) / subfolder
            if folder and not is_file(within / "config.json"):
                raise InputError(f"{within} is no model folder: it has no config.json")
            if folder and not any(is_file(within / name) for name in _WEIGHT_FILES):
                raise InputError(f"{within} has no weights: expected {_WEIGHT_FILES[0]}")
            where = {"local_files_only": local, "subfolder": subfolder, "trust_remote_code": False}
            backbone = AutoModel.from_pretrained(path, dtype=torch.float32, **where)
            tokenizer = AutoTokenizer.from_pretrained(path, **where)
        if backbone.config.is_encoder_decoder or tokenizer.pad_token_id is None:
            raise InputError(
                f"{name} ({backbone.config.model_type}) is no encoder with a padding token: give "
                "one of BERT's kind"
            )
        pooling = pooling or declared or "cls"
        if pooling == declared and pooling not in get_args(Pooling):
            raise InputError(
                f"{name} declares {pooling}, which is none of the poolings {_POOLINGS}: choose the "
                "one to read it with"
            )
        encoder = cls(backbone, tokenizer, pooling, seed)
        head = Path(path) / _HEAD_FILE
        if is_file(head):
            try:
                weights = load_file(head)
                if any("running_mean" in key for key in weights):
                    encoder.head = BatchNormHead(backbone, seed)
                encoder.head.load_state_dict(weights)
            except (SafetensorError, RuntimeError):  # broken, or of another width
                raise InputError(f"{head} does not fit this encoder: delete it") from None
        return encoder.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.device

    @property
    def dimension(self) -> int:
        """Width D of an embedding."""
        return self.backbone.config.hidden_size

    def tokenize(self, sentences: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Token ids of each sentence with the special tokens, cut at `max_length` tokens."""
        most = min(max_length or self.max_length, self.max_length)
        return self.tokenizer(list(sentences), truncation=True, max_length=most)["input_ids"]

    def pool(self, features: dict[str, Tensor], layers: int = 0) -> Tensor:
        """One pass of the backbone over a padded batch, pooled; no head.

        cls: the first token's last hidden state. mean: mean over tokens of the last layer.
        mean_first_last, mean_top2: mean over tokens of the average of two layers: the first
        layer's output (not the embeddings) and the last; the last two.

        Args:
            features: the backbone's inputs; `attention_mask` is (n, L) with 1 on text. Or what
                `packing.packed` makes of n sentences.
            layers: how many layers below the last are pooled too, each by itself: its first token
                for cls, else its mean over tokens.

        Returns: (n, D) float, in the backbone's dtype; with layers (n, 1 + layers, D), from the
        last layer down."""
        cls, packing = self.pooling == "cls", features.get("packing")

        def read(tokens: Tensor) -> Tensor:
            if packing is not None:
                return tokens[0, packing.first] if cls else packing.mean(tokens)
            mask = features["attention_mask"].unsqueeze(-1)
            return tokens[:, 0] if cls else (tokens * mask.to(tokens.dtype)).sum(1) / mask.sum(1)

        two_layers = self.pooling not in ("cls", "mean")
        ours = self.training or packing is not None  # in place of the library's attention
        with (
            speed.cheap_dropout_in(self.backbone) if ours else nullcontext(),
            speed.first_token_only(self.backbone, packing) if cls else nullcontext(),
        ):
            output = self.backbone(**features, output_hidden_states=two_layers or layers > 0)
        tokens = output.last_hidden_state
        if two_layers:
            other, _ = layers_read(self.pooling, self.backbone.config.num_hidden_layers)
            tokens = (tokens + output.hidden_states[other]) / 2
        top = tokens[:, 0] if cls else read(tokens)
        if not layers:
            return top
        below = output.hidden_states[-2 : -2 - layers : -1]
        return torch.stack([top, *map(read, below)], dim=1)

    def forward(
        self,
        token_ids: Sequence[Sequence[int]],
        second: Sequence[Sequence[int]] | None = None,
        layers: int = 0,
        further: Sequence[Sequence[Sequence[int]]] = (),
    ) -> tuple[Tensor, ...]:
        """Two views of every sentence for the loss: each sentence runs twice, side by side.

        In training mode the views differ by their dropout masks (Gao et al. 2021, section 3).

        token_ids: N sentences, from `tokenize`. second: N sentences, where the second view is to be
        of other tokens. layers: how many layers below the last come along, see `pool`. further:
        each N sentences more, of which one view comes along.

        Returns: u, v, (N, D) float, after the head; with layers a third, (N, 2 * layers, D): both
        views' vectors of those layers, after the same head; then (N, D) for each of `further`."""
        if second is None:
            views = self._views(token_ids, 2, layers)
        else:
            views = torch.cat([self._views(x, 1, layers) for x in (token_ids, second)], dim=1)
        u, v = views[:, :, 0].unbind(1)
        below = (views[:, :, 1:].flatten(1, 2),) if layers else ()
        return u, v, *below, *(self._views(x, 1, 0)[:, 0, 0] for x in further)

    def _views(self, token_ids: Sequence[Sequence[int]], copies: int, layers: int) -> Tensor:
        """(N, copies, 1 + layers, D) float after the head."""

        def embedding(flat: Tensor) -> Tensor:  # in the precision of the other weights
            return self.backbone.get_input_embeddings()(flat).to(self.head[0].weight.dtype)

        if packs(self.backbone, token_ids):
            line = packed(token_ids, copies, self.backbone, embedding)
            views = self.pool(line, layers).unflatten(0, (copies, -1)).transpose(0, 1)
        else:
            order: list[int] = []
            pooled = []
            for rows, features in speed.length_groups(token_ids, embedding, self.device):
                repeated = {name: torch.cat([x] * copies) for name, x in features.items()}
                order += rows
                pooled.append(self.pool(repeated, layers).unflatten(0, (copies, -1)))
            back = torch.tensor(order, device=self.device).argsort()
            views = torch.cat(pooled, dim=1).transpose(0, 1)[back]
        views = views if layers else views.unsqueeze(2)
        return self.head(views) if self.pooling == "cls" else views

    @torch.inference_mode()
    def encode(
        self,
        sentences: Sequence[str],
        batch_size: int = 64,
        normalize: bool = False,
        precision: Precision = "float32",
    ) -> np.ndarray:
        """Embed n sentences without dropout and without the head: (n, D) float32.

        Batches are formed by length, so that little is padded; rows come back in input order, with
        `normalize` at unit length. What is longer than the backbone's own limit is cut.

        batch_size: how many sentences make a batch; on a CPU more of short ones and fewer of long
        ones, 32 tokens each. precision: float32, bf16, or auto. In bf16 an embedding of the
        packaged encoder has a cosine above 1 - 5e-5 with that in float32.

        InputError: `sentences` is a single string or holds something else than strings, or
        `batch_size` is below 1."""
        if isinstance(sentences, str) or not all(isinstance(s, str) for s in sentences):
            raise InputError("sentences must be a sequence of strings")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        embeddings = np.empty((len(sentences), self.dimension), dtype=np.float32)
        if not len(sentences):
            return embeddings
        token_ids = self.tokenize(sentences)
        shown = {"unit": " sentences", "delay": 2, "leave": False}
        was_training = self.training
        self.eval()
        low = resolve_precision(precision, self.device) == "bf16"
        try:
            with (
                torch.autocast(self.device.type, torch.bfloat16, enabled=low),
                tqdm(total=len(sentences), desc="encoding", **shown) as bar,
            ):
                for rows in self._batches(token_ids, batch_size):
                    pooled = self.pool(self.features([token_ids[i] for i in rows]))
                    embeddings[rows] = pooled.float().cpu().numpy()
                    bar.update(len(rows))
        finally:
            self.train(was_training)
        if normalize:
            embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True).clip(1e-12)
        return embeddings

    def _batches(
        self, token_ids: Sequence[Sequence[int]], batch_size: int
    ) -> Iterator[Sequence[int]]:
        """Rows from the longest to the shortest sentence."""
        order = sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))
        ends = np.cumsum([len(token_ids[i]) for i in order])
        start = 0
        while start < len(order):
            end = start + batch_size
            if self.device.type == "cpu":
                tokens = ends[start] - len(token_ids[order[start]]) + 32 * batch_size
                end = max(start + 1, int(np.searchsorted(ends, tokens, "right")))
            yield order[start:end]
            start = end

    def features(self, token_ids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The inputs of the backbone for some sentences, as `pool` takes them."""
        if packs(self.backbone, token_ids):
            return packed(token_ids, 1, self.backbone, self.backbone.get_input_embeddings())
        batch = self.tokenizer.pad({"input_ids": token_ids}, return_tensors="pt")
        return {k: x.to(self.device) for k, x in batch.items() if k in self._inputs}

    def save_pretrained(self, path: str | Path) -> None:
        """Write a folder that `AutoModel` and, with its pooling, `SentenceTransformer` load.

        The head lies beside, in a file that is read by `from_pretrained` only."""
        path = Path(path)
        self.backbone.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        head = {k: x.detach().cpu().contiguous() for k, x in self.head.state_dict().items()}
        save_file(head, path / _HEAD_FILE)
        write_layout(path, self.pooling, self.backbone.config, self.max_length)


@contextmanager
def loading(what: str, instead: str) -> Iterator[None]:
    """Load what a user has named: without the library's chatter, and with one line if it fails.

    That `InputError` says what could be given instead, beside the name of a model on the hub."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except InputError:
        raise
    except pickle.UnpicklingError:
        raise InputError(
            f"the weights of {what} are a pickle that holds more than tensors, and are not "
            "unpickled: convert them to safetensors where you trust them"
        ) from None
    except Exception as error:  # dozens of types, from missing files to broken JSON
        raise InputError(
            f"{what} could not be loaded ({first_line(error)}): give {instead}, or the name of a "
            "model on the hub"
        ) from None
    finally:
        transformers.logging.set_verbosity(verbosity)


class BatchNormHead(nn.Sequential):
    """DiffCSE's head: Linear -> norm -> ReLU -> Linear -> norm over a batch's vectors, both views'.

    Twice as wide in the middle, without biases; the last norm has no weights of its own."""

    def __init__(self, backbone: PreTrainedModel, seed: int) -> None:
        width = backbone.config.hidden_size
        first = nn.Linear(width, 2 * width, bias=False)
        last = nn.Linear(2 * width, width, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for layer in (first, last):
            std = getattr(backbone.config, "initializer_range", 0.02)
            nn.init.normal_(layer.weight, std=std, generator=generator)
        norm, last_norm = nn.BatchNorm1d(2 * width), nn.BatchNorm1d(width, affine=False)
        super().__init__(first, norm, nn.ReLU(), last, last_norm)

    def forward(self, vectors: Tensor) -> Tensor:
        """(..., D) after the head: in float32, float64 in a float64 module, whatever comes in."""
        first, norm, activation, last, last_norm = self
        with torch.autocast(vectors.device.type, enabled=False):
            x = vectors.flatten(0, -2).to(norm.running_mean.dtype)
            x = activation(_normed(nn.functional.linear(x, first.weight.to(x)), norm))
            x = _normed(nn.functional.linear(x, last.weight.to(x)), last_norm)
        return x.view(vectors.shape)


def _normed(x: Tensor, norm: nn.BatchNorm1d) -> Tensor:
    """Batch normalisation by weights that may be of lower precision than what they are put to."""
    if norm.training:
        norm.num_batches_tracked.add_(1)
    weight, bias = (None if w is None else w.to(x) for w in (norm.weight, norm.bias))
    means = norm.running_mean, norm.running_var
    return nn.functional.batch_norm(x, *means, weight, bias, norm.training, norm.momentum, norm.eps)


def linear(backbone: PreTrainedModel, out: int, seed: int) -> nn.Linear:
    """A layer on top of a backbone, begun as the backbone's own: normal weights, zero biases."""
    layer = nn.Linear(backbone.config.hidden_size, out)
    std = getattr(backbone.config, "initializer_range", 0.02)
    nn.init.normal_(layer.weight, std=std, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(layer.bias)
    return layer


def _positions(backbone: PreTrainedModel) -> int:
    """How many tokens the position table takes; RoBERTa's kind keeps its first rows for padding."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    limit = backbone.config.max_position_embeddings
    return limit if padding is None else limit - padding - 1


def weights_hash(module: nn.Module) -> str:
    """Hexadecimal SHA-256 over the names and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
