"""The poolings by name."""

from typing import Literal

Pooling = Literal["cls", "mean", "mean_first_last", "mean_top2"]
"""How tokens become a sentence vector, see `SentenceEncoder.pool`."""
