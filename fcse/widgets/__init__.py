"""Interactive panels over the same functions that the notebooks call.

Each has a `widget` that a notebook displays, and controls: setting their `.value` redraws."""

from fcse.widgets.ablation import AblationPanel
from fcse.widgets.maps import MapExplorer
from fcse.widgets.negatives import NegativeExplorer
from fcse.widgets.picker import RunPicker, SeedsPicker
from fcse.widgets.plane import TrajectoryPlane
from fcse.widgets.training import TrainingPanel
