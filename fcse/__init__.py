"""A study kit for Focal-InfoNCE (Hou & Li 2023): losses, encoder, training, evaluation."""

__version__ = "0.2.0"
