"""What a run needs to go on after a step, as tensors by name and plain facts."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import Tensor, nn

from fcse import processes
from fcse.config import TrainConfig
from fcse.errors import InputError
from fcse.methods import Moments
from fcse.training import micro_batches
from fcse.training.folder import RunFolder, State


@dataclass
class Progress:
    """What a run remembers from step to step beside its tensors."""

    processes: int
    step: int = 0
    best: float = -math.inf
    kept_step: int = 0
    kept_scores: dict[str, float] = field(default_factory=dict)
    masked_pairs: int = 0
    wall_time_s: float = 0.0

    def judge(self, step: int, scores: dict[str, float], config: TrainConfig) -> bool:
        """Whether the weights of this step are the ones to keep so far."""
        value = scores.get(config.metric, math.nan)
        value = -math.inf if math.isnan(value) else value
        keep = step == config.steps if config.metric == "last" else value >= self.best
        if keep:
            self.best, self.kept_step, self.kept_scores = value, step, scores
        return keep


def pack(
    progress: Progress,
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    random_states: Sequence[Mapping[str, Tensor]],
    acting: Mapping[str, Moments],
) -> State:
    """Everything that decides how a run goes on; `random_states` are those of each process."""
    tensors = {f"weights/{name}": x for name, x in trained.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{name}": x for name, x in moments.items()}
    for process, random_state in enumerate(random_states):
        tensors |= {f"random/{process}/{kind}": x for kind, x in random_state.items()}
    for key, method in acting.items():
        # Copies: the file takes no two tensors that share memory, such as both views of a batch.
        tensors |= {f"method/{key}/{name}": x.clone() for name, x in method.state().items()}
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    return State(progress.step, tensors, asdict(progress))


def unpack(
    state: State,
    folder: RunFolder,
    trained: nn.Module,
    optimizer: torch.optim.Optimizer,
    acting: Mapping[str, Moments],
) -> Progress:
    """Take all to a `pack`ed state; InputError: it was begun by another number of processes."""
    progress = Progress(**{f.name: state.facts[f.name] for f in fields(Progress)})
    now = processes.world()
    if progress.processes != now.num_processes:
        raise InputError(
            f"run {folder.path} was begun by {progress.processes} processes, not "
            f"{now.num_processes}: go on with as many, or delete it"
        )
    moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
    remembered: dict[str, dict[str, Tensor]] = {key: {} for key in acting}
    weights, random_state = {}, {}
    for path, x in state.tensors.items():
        match path.split("/"):
            case ["weights", name]:
                weights[name] = x
            case ["optimizer", i, name]:
                moments[int(i)][name] = x
            case ["random", process, kind] if int(process) == now.process_index:
                random_state[kind] = x
            case ["method", key, *name]:
                remembered[key]["/".join(name)] = x
    trained.load_state_dict(weights)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(moments)})
    for key, method in acting.items():
        method.restore(remembered[key])
    micro_batches.set_random_state(random_state)
    return progress
