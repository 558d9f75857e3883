"""Backbone, pooling and head; checkpoints in, model folders out.

`SentenceEncoder` is loaded when it is first asked for: the names of poolings need no torch."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "SentenceEncoder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fcse.encoder.sentence_encoder import SentenceEncoder

    return SentenceEncoder
