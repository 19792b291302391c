# SPDX-License-Identifier: Apache-2.0
"""Writing files that are either whole or not there, by one process at a time."""

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_TEMPORARY = re.compile(r"(?P<name>.+)\.tmp-(?P<pid>\d+)-[0-9a-f]{16}")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary file to write, and rename it when the block ends without error.

    The temporary file lies beside the file, so that renaming is one step. Its name
    cannot be guessed and it is created here, never opened through a link that somebody
    put there. It has the permissions of any new file.

    Args:
        path: The file; its directory exists. A link is replaced, not followed.

    Yields:
        The temporary file's path; it exists and is empty.

    Raises:
        OSError: It cannot be written; what was there before is still there.
    """
    with writing_together([path]) as (temporary,):
        yield temporary


@contextmanager
def writing_together(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Like `writing` for files that belong together: all are replaced, or none.

    Of several, what was there is set aside until all new files have their names; a
    failure or an interruption puts it back. The last file is taken away first and
    comes last: let it be the one without which the others count for nothing. Should
    the process be killed between the renames, nothing is mixed, and what was there
    lies beside it as `NAME.old-...`.

    Args:
        paths: The files; their directories exist. Links are replaced, not followed.

    Yields:
        The temporary files' paths in the same order; they exist and are empty.

    Raises:
        OSError: One cannot be written; what was there before is still there.
    """
    with ExitStack() as stack:
        temporary = []
        for path in paths:
            temporary.append(_create(path))
            stack.callback(temporary[-1].unlink, missing_ok=True)
        modes = [stat.S_IMODE(path.stat().st_mode) for path in temporary]
        yield temporary
        for path, mode in zip(temporary, modes, strict=True):
            _settle(path, mode)
        if len(paths) == 1:
            os.replace(temporary[0], paths[0])
        else:
            _swap(temporary, paths)


@contextmanager
def locked(directory: Path, refusal: Exception) -> Iterator[None]:
    """Keep others that ask for the same out of a directory for the length of a block.

    Args:
        directory: The directory; created with its parents if missing.
        refusal: Raised where somebody else has it.

    Raises:
        Exception: `refusal`.
        OSError: The directory cannot be created.
    """
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def write_all(file: int, data: bytes | memoryview) -> None:
    """Write to an open file until all is written.

    Args:
        file: Its descriptor.
        data: Bytes.

    Raises:
        OSError: It cannot be written; a part may be.
    """
    left = memoryview(data)
    while left:
        left = left[os.write(file, left) :]


def atomic_write(path: Path, content: bytes) -> Path:
    """Write a file under a temporary name, then rename it.

    Args:
        path: The file; its directory exists.
        content: All of it.

    Returns:
        `path`.

    Raises:
        OSError: It cannot be written; what was there before is still there.
    """
    with writing(path) as temporary:
        temporary.write_bytes(content)
    return path


def without_temporary(name: str) -> str:
    """The name of the file that a temporary file was to become.

    Args:
        name: Any file's name.

    Returns:
        `name` itself if it is not that of a temporary file of this module.
    """
    match = _TEMPORARY.fullmatch(name)
    return match["name"] if match else name


def remove_left_overs(directory: Path, names: re.Pattern[str]) -> None:
    """Remove temporary files that processes of this machine left when they died.

    Args:
        directory: Where to look.
        names: The files of which temporary ones are removed, in full.
    """
    for path in directory.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and names.fullmatch(match["name"]) and not _is_running(match["pid"]):
            path.unlink(missing_ok=True)


def free_name(path: Path) -> Path:
    """Return `path`, or else `path` with a number, where nothing is yet.

    Args:
        path: The name that is wanted.

    Returns:
        A path in the same directory.
    """
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = path.with_name(f"{path.name}{number}")
    return free


def _unguessable(path: Path, kind: str) -> Path:
    """A name beside `path`; the process id tells later whose it was."""
    name = f"{path.name}.{kind}-{os.getpid()}-{secrets.token_hex(8)}"
    return path.with_name(name)


def _create(path: Path) -> Path:
    """Create an empty temporary file for `path`."""
    temporary = _unguessable(path, "tmp")
    # O_EXCL follows no link. The mode is cut by the umask, as that of any new file;
    # tempfile's would be readable by nobody else for ever.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return temporary


def _settle(path: Path, mode: int) -> None:
    """Bring a file to the disk before it gets its name: a crash leaves none empty."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        # safetensors puts a file in its place that nobody else may read.
        os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(temporary: Sequence[Path], paths: Sequence[Path]) -> None:
    """Put temporary files in the place of several others, or leave those there."""
    aside: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        for path in reversed(paths):
            if os.path.lexists(path):
                aside.append((_unguessable(path, "old"), path))
                os.rename(path, aside[-1][0])
        for new, path in zip(temporary, paths, strict=True):
            placed.append(path)
            os.rename(new, path)
    except BaseException:
        for path in placed:
            if all(path != former for _, former in aside):
                path.unlink(missing_ok=True)
        for old, path in reversed(aside):
            if os.path.lexists(old):
                os.replace(old, path)
        raise
    for old, _ in aside:
        old.unlink(missing_ok=True)


def _is_running(pid: str) -> bool:
    """Whether a process of this machine has the id."""
    with suppress(ProcessLookupError, OverflowError):
        try:
            os.kill(int(pid), 0)
        except PermissionError:
            return True
        return True
    return False
