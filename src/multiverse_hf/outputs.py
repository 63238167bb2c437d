"""Files and folders that commands and recipes write: whole or not at all, and checked before the work begins."""

import contextlib
import glob
import json
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from multiverse_hf.errors import CommandError

FIRST_S, EVERY_S = 5, 30  # seconds to a log's first line about the progress, and between lines


def check_output(path: Path, is_folder: bool = False) -> None:
    """Check that a file, or files in a folder, can be written, so that long work does not fail at its end.

    The parent folders are created.

    Raises:
        CommandError: if it cannot.
    """
    if not is_folder and path.exists() and not path.is_file():
        if path.is_dir():
            raise CommandError(f"cannot write {path}: it is a folder; name a file in it")
        return  # a device or a pipe
    folder = path if is_folder else path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as err:
        raise CommandError(f"cannot write {path}: {err.strerror or err}; name a place that can be written to") from err


def json_text(value: Any, indent: int | None = None) -> str:
    """Return JSON with a line end. NaN and Infinity, which JSON lacks, become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def write_output(path: Path, text: str) -> None:
    """Write a file whole or not at all: an interrupted write leaves the old file."""
    if path.exists() and not path.is_file():  # a device or a pipe must not be replaced
        path.write_text(text, encoding="utf-8")
        return
    with output_folder(path.resolve().parent) as folder:  # resolved, so that a link stays one
        (folder / path.resolve().name).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write files to. At the end of the context they replace older files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with _staging(folder, ".writing-") as part:
        yield part
        for file in sorted(part.rglob("*")):
            if file.is_file():
                target = folder / file.relative_to(part)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)


def check_new_folder(folder: Path) -> None:
    """Check that a folder that does not exist yet, or is empty, can be written.

    Raises:
        CommandError: if it is not empty, or cannot be written or replaced.
    """
    try:
        is_there = folder.exists()
        is_taken = is_there and (not folder.is_dir() or any(folder.iterdir()))
    except OSError as err:
        raise CommandError(f"cannot read {folder}: {err.strerror or err}; name another place") from err
    if is_taken:
        what = "is not empty" if folder.is_dir() else "is a file"
        raise CommandError(f"{folder} {what}; name a new folder, or move it away")
    if is_there and (folder.resolve() == Path.cwd() or folder.is_mount()):
        raise CommandError(f"{folder} cannot be replaced as a whole; name a new folder in it")
    check_output(folder.resolve().parent, is_folder=True)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write files to. At the end of the context one rename makes it ``folder``.

    Until then it is in a hidden folder beside ``folder``. Hidden folders of killed processes are removed.

    Raises:
        CommandError: if ``folder`` is not empty.
    """
    check_new_folder(folder)
    folder = folder.resolve()
    prefix = f".{folder.name[:100]}.writing-"  # cut: file systems limit names
    with _staging(folder.parent, prefix) as part:
        whole = part / folder.name  # with its final name: a checkpoint's card names it
        whole.mkdir()
        yield whole
        try:
            whole.replace(folder)
        except OSError as err:  # another process wrote there in the meantime
            raise CommandError(f"cannot write {folder}: {err.strerror or err}; name a new folder") from err


@contextlib.contextmanager
def _staging(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a hidden folder that is removed at the end, and remove those of killed processes."""
    for left in parent.glob(f"{glob.escape(prefix)}*/lock"):
        with contextlib.suppress(FileNotFoundError), left.open("rb+") as file:  # its process may end in the meantime
            if lock_file(file):
                shutil.rmtree(left.parent, ignore_errors=True)
    try:
        made = tempfile.TemporaryDirectory(dir=parent, prefix=prefix)
    except OSError as err:
        raise CommandError(f"cannot write to {parent}: {err.strerror or err}; name another place") from err
    with made as part, (Path(part) / "new").open("wb") as file:
        lock_file(file)
        with contextlib.suppress(PermissionError):  # Windows, which lacks such locks too
            (Path(part) / "new").rename(
                Path(part) / "lock"
            )  # only now: a process that finds it unlocked removes the folder
        inside = Path(part) / "files"
        inside.mkdir()
        yield inside


def lock_file(file: Any, *, waits: bool = False) -> bool | None:
    """Lock a file against other processes, also on other machines. The lock ends with this process.

    It is a record lock, not flock: a process forked from this one must not keep it.

    Args:
        file: opened for writing.
        waits: wait until the lock is free.

    Returns:
        True; False if another process holds the lock; None on Windows and on file systems without locks.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True
