"""Which precision pays on which machine, and what that machine is."""

import platform
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "bf16", "float32"]


def bf16_units(device: "torch.device") -> str:
    """The units of a device that multiply bf16 matrices, by name; empty where there are none.

    Without them bf16 is emulated, and slower than float32 by far."""
    import torch

    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "tensor cores" if native else ""
    if device.type != "cpu":
        return ""
    found = {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
    }
    return ", ".join(name for name, there in found.items() if there)


def resolve_precision(precision: Precision, device: "torch.device | None" = None) -> Precision:
    """What "auto" means on a device, by default this machine's: bf16 where it has units for it."""
    if precision != "auto":
        return precision
    import torch

    device = device or torch.accelerator.current_accelerator(check_available=True)
    return "bf16" if bf16_units(device or torch.device("cpu")) else "float32"


def hardware(device: "torch.device") -> str:
    """What computes, in words: a GPU by its name, a processor with its bf16 units and threads.

    Runs repeat to the last bit where these words are the same."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor()
    with suppress(OSError):
        said = Path("/proc/cpuinfo").read_text()
        name = next(iter(re.findall(r"^model name\s*: (.*)$", said, re.M)), name)
    threads = torch.get_num_threads()
    units = bf16_units(device) or "no bf16 units"
    return f"{name or device.type}, {units}, {threads} thread{'s'[: threads > 1]}"
