"""What is written is whole or not there, whoever is killed when; and the lock that tells who is alive.

A file or a folder is written in a scratch folder beside its place, and moved there when it is on the disk. A
lock file beside the scratch folder is locked while its process lives: the next writer removes what is not.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

SCRATCH = ".seqtopk-"  # what the names of scratch folders and of their lock files begin with
LOCK = ".lock"


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A new name to write a file or a folder to, which is then moved to `path`; of several processes the last
    wins. Raises OSError."""
    with scratch(path.parent) as folder:
        yield folder / path.name
        put_on_disk(folder)
        os.replace(folder / path.name, path)


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A new empty folder in `parent`, which is removed at the end. Raises OSError."""
    remove_leftovers(parent)
    handle, name = tempfile.mkstemp(LOCK, SCRATCH, parent)
    with open(handle) as file:
        with contextlib.suppress(OSError):  # nobody removes what cannot be locked
            lock(file)
        folder = Path(name).with_suffix("")
        try:
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            Path(name).unlink(missing_ok=True)  # another process may have found it before it was locked


def remove_leftovers(parent: Path) -> None:
    """Remove the scratch folders in `parent` whose processes were killed."""
    for path in parent.glob(f"{SCRATCH}*{LOCK}"):
        with contextlib.suppress(OSError), open(path, "r+") as file:
            lock(file)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink()


def put_on_disk(folder: Path) -> None:
    """Wait until the files below a folder would survive a power cut. Raises OSError if the disk is full."""
    for path in filter(Path.is_file, folder.rglob("*")):
        with open(path, "r+") as file:
            os.fsync(file.fileno())


def lock(file: IO, wait: bool = False) -> None:
    """Lock an open file until it is closed, or `wait` until that can be done.

    BlockingIOError: another has it, and nobody waits; OSError: no locks here.
    """
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
