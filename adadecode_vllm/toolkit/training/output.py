# SPDX-License-Identifier: Apache-2.0
"""Where a training works, and when what it made takes the place of what was there.

A run works in ``OUT/run``. Where that is a finished or another run's, it works in
``OUT/run.new``, and what is in OUT is replaced when the new heads are written.
"""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.files import locked, without_temporary
from adadecode_vllm.heads.config import CONFIG_FILE
from adadecode_vllm.heads.output import check_output

RUN_DIRECTORY = "run"
HISTORY_FILE = "history.json"
RUN_FILE = "run.yaml"
FULL_HEADS_FILE = "full_heads.safetensors"
CHECKPOINT_FILE = "checkpoint.safetensors"
CACHE_DIRECTORY = "cache"
CURVES_DIRECTORY = "tensorboard"

_NEW = "run.new"
_OLD = "run.old"
_CONTENT = (
    HISTORY_FILE,
    RUN_FILE,
    FULL_HEADS_FILE,
    CHECKPOINT_FILE,
    CACHE_DIRECTORY,
    CURVES_DIRECTORY,
)


def check_training_output(output: Path, *, overwrite: bool) -> None:
    """Refuse a directory that heads must not be trained in; nothing is changed.

    Args:
        output: OUT.
        overwrite: Whether finished heads and other runs there may be replaced.

    Raises:
        AdaDecodeError: It holds heads that may not be replaced, or other files.
    """
    runs = (RUN_DIRECTORY, _NEW, _OLD)
    overwrite = overwrite or _is_ending(output)
    check_output(output, "OUT", overwrite=overwrite, ours=runs)
    for run in runs:
        directory = output / run
        names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
        strange = [name for name in names if not _is_of_a_run(name)]
        if strange or (directory.exists() and not directory.is_dir()):
            what = f"{run}/{min(strange)}" if strange else f"a file {run}"
            raise AdaDecodeError(
                f"OUT {output}: it holds {what}, which no training wrote; give another "
                "directory, so that nothing is lost"
            )
    if _is_finished(output) and not overwrite:
        raise AdaDecodeError(
            f"OUT {output}: it already holds heads; give another directory, or pass "
            "--overwrite to train them anew"
        )


def alone(output: Path) -> AbstractContextManager[None]:
    """Let one training at a time write to OUT.

    Args:
        output: OUT; created with its parents if missing.

    Returns:
        The block's context. Entering it raises an AdaDecodeError where another run is
        writing there, and an OSError where the directory cannot be created.
    """
    refusal = AdaDecodeError(
        f"OUT {output}: another `adadecode train` is writing there; wait until it has "
        "ended, or give another directory"
    )
    return locked(output, refusal)


def choose_run_directory(output: Path, key: str, *, overwrite: bool) -> Path:
    """Decide where a run works, or goes on; only reads.

    Args:
        output: OUT; `check_training_output` accepted it.
        key: What the run depends on.
        overwrite: Whether finished heads and other runs may be replaced.

    Returns:
        The directory; it may be missing. Without a checkpoint of this run, what is in
        it counts for nothing.

    Raises:
        AdaDecodeError: There is an unfinished run of another kind, or a checkpoint
            that cannot be read.
    """
    run = output / RUN_DIRECTORY
    for directory in (run, output / _NEW):
        if checkpoint_key(directory, tolerant=overwrite) == key:
            return directory
    if not (run / CHECKPOINT_FILE).exists() and not _is_finished(output):
        return run
    if overwrite:
        return output / _NEW
    raise AdaDecodeError(
        f"OUT {output}: it holds an unfinished run with another model, other text or "
        "other options; give the same ones, another directory, or --overwrite"
    )


def checkpoint_key(directory: Path, *, tolerant: bool = False) -> str | None:
    """What the run of a checkpoint depends on.

    Args:
        directory: Where a run works.
        tolerant: Whether a damaged checkpoint is the same as none.

    Returns:
        The key; None where there is no checkpoint.

    Raises:
        AdaDecodeError: The checkpoint cannot be read.
    """
    path = directory / CHECKPOINT_FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get("run_key")
    except (SafetensorError, OSError) as error:
        if tolerant:
            return None
        raise AdaDecodeError(
            f"OUT {directory.parent}: the checkpoint {path.name} cannot be read "
            f"({error}); start again with --overwrite"
        ) from error


def begin(directory: Path, key: str) -> None:
    """Make a run's directory ready.

    Args:
        directory: What `choose_run_directory` returned.
        key: What the run depends on. An unfinished run of another kind that was to
            replace what is in OUT, as this one is, is removed.

    Raises:
        OSError: It cannot be created.
    """
    if directory.name == _NEW:
        there = (directory / CHECKPOINT_FILE).exists()
        if there and checkpoint_key(directory, tolerant=True) != key:
            shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)


def finish(output: Path, directory: Path) -> None:
    """Leave the finished run in ``OUT/run``; the heads have been written.

    The checkpoint goes last: until then the same command ends this again.

    Args:
        output: OUT.
        directory: Where the run worked.

    Raises:
        OSError: A directory cannot be renamed.
    """
    run, old = output / RUN_DIRECTORY, output / _OLD
    shutil.rmtree(directory / CACHE_DIRECTORY, ignore_errors=True)
    if directory != run:
        shutil.rmtree(old, ignore_errors=True)
        if run.exists():
            run.rename(old)
        directory.rename(run)
        shutil.rmtree(old, ignore_errors=True)
    (run / CHECKPOINT_FILE).unlink(missing_ok=True)


def _is_of_a_run(name: str) -> bool:
    """Whether a training writes files of a name, or safetensors while it saves one."""
    return name.startswith(".tmp") or without_temporary(name) in _CONTENT


def _is_ending(output: Path) -> bool:
    """Whether a run has written what it made, its heads perhaps, and is not tidied up.

    It worked in ``OUT/run``, so there were no heads before it.
    """
    run = output / RUN_DIRECTORY
    return (run / RUN_FILE).exists() and (run / CHECKPOINT_FILE).exists()


def _is_finished(output: Path) -> bool:
    """Whether a training has ended here; full-size heads have no configuration."""
    run = output / RUN_DIRECTORY
    return (output / CONFIG_FILE).exists() or (
        (run / RUN_FILE).exists() and not (run / CHECKPOINT_FILE).exists()
    )
