"""Training: the loop, its runs and their folders, corpora, micro-batches."""

from fcse.config import TrainConfig
from fcse.training.loop import train
from fcse.training.result import TrainResult, load_run, read_run, run_folder
