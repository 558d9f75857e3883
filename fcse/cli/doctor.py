"""What is wrong with a machine, and how to mend it."""

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from fcse import __version__, data
from fcse.encoder.precision import bf16_units, resolve_precision
from fcse.errors import InputError

_MEMORY_GIB, _DISK_GIB = 3, 2
"""What the embedded default takes at most: `make study` needs 2 GB of memory, its runs 1 GB."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what is there, and whether that will do."""

    what: str
    said: str
    healthy: bool = True


def examine() -> Iterator[Finding]:
    """Look at everything a first run needs, in the order in which it is needed."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    python = platform.python_version()
    yield Finding("fcse", f"{__version__}, Python {python}, torch {torch.__version__}")
    yield Finding("device", f"{device.type} {name}, {os.cpu_count()} cores".replace(" ,", ","))
    yield Finding("threads", f"torch computes with {torch.get_num_threads()}")
    units = bf16_units(device) or "none"
    taken = resolve_precision("auto", device)
    yield Finding("precision", f"auto means {taken} here (units for bf16: {units})")
    free = psutil.virtual_memory().available / 2**30
    short = f", {_MEMORY_GIB} are needed: close other programs" if free < _MEMORY_GIB else ""
    yield Finding("memory", f"{free:.1f} GiB free{short}", healthy=not short)
    yield _folder("runs", data.runs_folder(), "FCSE_RUNS")
    yield _folder("cache", data.cache_folder(), "XDG_CACHE_HOME")
    for asset in (data.MINILM, data.WIKI_MINI, data.LEE_DOCUMENTS, data.LEE_JUDGEMENTS):
        try:
            asset.locate()
            yield Finding("packaged", f"{asset.what}: ok, SHA-256 {asset.sha256[:12]}")
        except InputError as error:
            yield Finding("packaged", f"{asset.what}: {error}", healthy=False)
    try:
        folder = data.senteval_folder()
        yield Finding("STS data", str(folder or "FCSE_SENTEVAL is not set; else the hub"))
    except InputError as error:
        yield Finding("STS data", str(error), healthy=False)
    reachable = data.hub_reachable()
    yield Finding("hub", "reachable" if reachable else "out of reach (not needed)")


def _folder(what: str, folder: Path, variable: str) -> Finding:
    """Whether a folder, or the nearest one above it that is there, takes files and has room."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            free = shutil.disk_usage(there).free / 2**30
    except OSError as error:
        said = f"{folder} cannot be written ({error.strerror}): name another with {variable}"
        return Finding(what, said, healthy=False)
    said = f"{folder}: {free:.1f} GiB free"
    if free < _DISK_GIB:
        way_out = f"make room, or name another folder with {variable}"
        return Finding(what, f"{said}, {_DISK_GIB} are needed: {way_out}", healthy=False)
    return Finding(what, said)
