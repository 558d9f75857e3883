"""What a user, not a programmer, can cause: the one error, and files that are cut off."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class InputError(ValueError):
    """Something the user named is missing or wrong; the message names it and the way out."""


def first_line(error: Exception) -> str:
    """What an exception says, cut to one line, without a terminal's colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
    return (text.splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def writing(what: object, way_out: str = "make room, or name another place") -> Iterator[None]:
    """Turn what a full disk or a read-only folder raises into an `InputError` of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{what} cannot be written ({reason}): {way_out}") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which becomes `path` once it is whole."""
    partial = path.with_name(f"{path.name}.partial")
    _remove(partial)
    try:
        yield partial
        if path.is_dir():
            _remove(path)
        partial.replace(path)
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
