# SPDX-License-Identifier: Apache-2.0
"""A heads directory on disk: which files may be opened, and what they must hold.

Heads are downloaded from strangers. Hence only safetensors are opened, never pickle,
and no link may lead out of the directory. Nothing here imports torch.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from adadecode_vllm.errors import AdaDecodeError

CARD_FILE = "README.md"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
DRAFT_TOKENS = "draft_token_ids"  # the tensor with the draft vocabulary

StoredTensors = dict[str, tuple[tuple[int, ...], str]]
"""By name, shape and dtype of tensors, the dtype in safetensors' spelling (`F32`)."""

_FLAG = "--adadecode-heads"
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_NO_PICKLE = "only safetensors are loaded, never pickle"


def heads_error(directory: Path, reason: str, remedy: str) -> AdaDecodeError:
    """Build the error for a heads directory that cannot be used.

    Args:
        directory: What the user gave to `--adadecode-heads`.
        reason: What is wrong, without a full stop.
        remedy: What to do about it, in the imperative.

    Returns:
        The error, to be raised by the caller.
    """
    return AdaDecodeError(f"{_FLAG} {directory}: {reason}; {remedy}")


def weights_digest(directory: Path) -> str:
    """SHA-256 of the weights' file, in hexadecimal digits.

    Args:
        directory: A heads directory.

    Raises:
        OSError: The file cannot be read.
    """
    with (directory / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def heads_named(flag: str) -> Iterator[None]:
    """Let errors about heads name the argument of a command that is not the server's.

    Args:
        flag: What the user gave the directory to, in place of `--adadecode-heads`.

    Raises:
        AdaDecodeError: What was raised in the block, with that name.
    """
    try:
        yield
    except AdaDecodeError as error:
        text = str(error)
        if not text.startswith(f"{_FLAG} "):
            raise
        raise AdaDecodeError(flag + text.removeprefix(_FLAG)) from error


def tensor_name(layer: int) -> str:
    """Return the name of an exit's T in `model.safetensors`."""
    return f"exit_heads.{layer}.weight"


def memory_name(layer: int) -> str:
    """Return the name of an exit's U in `model.safetensors`."""
    return f"exit_heads.{layer}.memory"


def config_path(directory: Path) -> Path:
    """Return the real path of a heads directory's `config.json`.

    Args:
        directory: The heads directory.

    Returns:
        The path with all links resolved.

    Raises:
        AdaDecodeError: The directory or the file is missing, or a link leaves the
            directory.
    """
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "does not exist"
        raise heads_error(
            directory,
            f"the path {what}",
            "give the directory that `adadecode init-heads` or training wrote",
        )
    return real_path(directory, CONFIG_FILE)


def weights_path(directory: Path) -> Path:
    """Return the real path of a heads directory's `model.safetensors`.

    Args:
        directory: The heads directory; it exists.

    Returns:
        The path with all links resolved.

    Raises:
        AdaDecodeError: The file is missing, there are pickle files in its stead, or a
            link leaves the directory.
    """
    path = directory / WEIGHTS_FILE
    if not path.exists() and not path.is_symlink():
        pickles = sorted(
            file.name
            for pattern in _PICKLE_PATTERNS
            for file in directory.glob(pattern)
        )
        if pickles:
            raise heads_error(
                directory,
                f"it holds {', '.join(pickles)} but no {WEIGHTS_FILE}; {_NO_PICKLE}",
                f"convert the weights to {WEIGHTS_FILE}",
            )
    return real_path(directory, WEIGHTS_FILE)


def real_path(directory: Path, name: str) -> Path:
    """Return the real path of a heads directory's file.

    In the cache of downloads every file is a link, within the cache.

    Args:
        directory: The heads directory; it exists.
        name: The file's name.

    Returns:
        The path with all links resolved.

    Raises:
        AdaDecodeError: The file is missing, or a link leaves the directory.
    """
    path = directory / name
    if not path.exists() and not path.is_symlink():
        if aside := sorted(file.name for file in directory.glob(f"{name}.old-*")):
            raise heads_error(
                directory,
                f"{name} is missing, because writing heads was interrupted",
                f"write them again, or rename {aside[-1]} and the file like it back",
            )
        raise heads_error(
            directory,
            f"{name} is missing",
            "give a directory that `adadecode init-heads` or training wrote",
        )
    root = directory.resolve()
    allowed = [root]
    # The Hugging Face cache: snapshots/<revision>/file -> ../../blobs/<hash>.
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, before 3.13
        raise heads_error(
            directory, f"{name} is a broken link", "copy the file itself there"
        ) from error
    if not any(target.is_relative_to(place) for place in allowed):
        raise heads_error(
            directory,
            f"{name} is a link that leaves the directory",
            "copy the file itself there",
        )
    return target


@contextmanager
def open_tensors(
    directory: Path,
    expected: StoredTensors,
    framework: Literal["np", "pt"] = "np",
) -> Iterator[Any]:
    """Open `model.safetensors` and check its names, shapes and dtypes.

    The data is not looked at until it is asked for.

    Args:
        directory: The heads directory.
        expected: What it must hold.
        framework: Of the tensors, as safetensors calls it; `np` needs no torch.

    Yields:
        What safetensors' `safe_open` yields.

    Raises:
        AdaDecodeError: The file is missing, is not safetensors, is truncated, or does
            not hold exactly these tensors.
    """
    path = weights_path(directory)
    try:
        with safe_open(path, framework=framework) as tensors:
            if problem := _header_problem(tensors, expected):
                raise heads_error(
                    directory,
                    problem,
                    f"save the heads again so that {WEIGHTS_FILE} and {CONFIG_FILE} "
                    "agree",
                )
            yield tensors
    except SafetensorError as error:
        raise _unreadable(directory, error) from error
    except OSError as error:
        raise heads_error(
            directory,
            f"{WEIGHTS_FILE} cannot be read ({error})",
            "check the file and its permissions",
        ) from error


def _header_problem(tensors: Any, expected: StoredTensors) -> str | None:
    """Say how a file differs from what is expected of it; None where it does not."""
    names = set(tensors.keys())
    if missing := sorted(expected.keys() - names):
        return f"{WEIGHTS_FILE} lacks {', '.join(missing)}"
    if unexpected := sorted(names - expected.keys()):
        return f"{WEIGHTS_FILE} holds the unexpected {', '.join(unexpected)}"
    for name, (shape, dtype) in expected.items():
        header = tensors.get_slice(name)
        if (found := tuple(header.get_shape())) != shape:
            return f"{name} has shape {found} instead of {shape}"
        if header.get_dtype() != dtype:
            return f"{name} has dtype {header.get_dtype()} instead of {dtype}"
    return None


def _unreadable(directory: Path, error: SafetensorError) -> AdaDecodeError:
    """Say in a sentence what safetensors found wrong with `model.safetensors`."""
    with weights_path(directory).open("rb") as file:
        start = file.read(9)
    # 8 bytes of length, then a JSON object: what begins so, or ends before, was
    # safetensors once.
    if start[8:] in (b"{", b""):
        return heads_error(
            directory,
            f"{WEIGHTS_FILE} is truncated or damaged ({error})",
            "copy or download it again",
        )
    return heads_error(
        directory,
        f"{WEIGHTS_FILE} is not a safetensors file ({error}); {_NO_PICKLE}",
        "save the heads as safetensors",
    )
