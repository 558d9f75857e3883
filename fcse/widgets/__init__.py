"""Interactive panels over the same functions that the notebooks call."""

from fcse.widgets.ablation import AblationPanel

__all__ = ["AblationPanel"]
