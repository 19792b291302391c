# SPDX-License-Identifier: Apache-2.0
"""Where `adadecode data` may write, and how data that is there is replaced.

Nothing that is there is touched before all that replaces it is complete: with
`--overwrite` the new data is made in `OUT/replacement` and then takes the place of the
old. A run that is interrupted there continues when the same command is given again.
"""

import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.files import locked, without_temporary
from adadecode_vllm.toolkit.data.info import (
    INFO_FILE,
    DatasetInfo,
    data_error,
    read_info,
)
from adadecode_vllm.toolkit.data.journal import JOURNAL_NAME
from adadecode_vllm.toolkit.data.shards import shard_files, shard_request

_REPLACEMENT = "replacement"
_REPLACED = "replaced"  # in the replacement


class Place(NamedTuple):
    """Where a data set is made.

    Attributes:
        out: The directory that the user named.
        directory: The same, or the one in it for what replaces its data.
        existing: What of the same request is there already; None for nothing.
    """

    out: Path
    directory: Path
    existing: DatasetInfo | None


def find_place(
    out: Path, sources: Mapping[str, Any], *, overwrite: bool = False
) -> Place:
    """Decide where to write, reading only.

    Args:
        out: The directory that the user named; it may be missing.
        sources: Of what is to be made, with `request`, `arguments` and, once they are
            known, `ids`.
        overwrite: Whether other data may be replaced.

    Returns:
        The place.

    Raises:
        AdaDecodeError: The directory holds something else.
    """
    if out.exists() and not out.is_dir():
        raise data_error(
            out, "the path is a file", "give the name of a directory", "OUT"
        )
    if not out.is_dir():
        return Place(out, out, None)
    _refuse_strangers(out, overwrite)
    existing = _read(out, overwrite)
    if existing is not None and _is_of(existing, sources):
        # Its rows follow from the request: continuing is beginning again.
        if not (overwrite and existing.complete):
            _refuse_others(out, sources["request"])
            return Place(out, out, existing)
    elif not _has_rows(out):
        return Place(out, out, None)  # begun, perhaps, but no row was made
    elif existing is not None and not overwrite:
        difference = _difference(existing, sources)
        raise data_error(
            out,
            f"it holds data that was made differently ({difference})",
            "choose another directory, or pass --overwrite to replace it",
            "OUT",
        )
    directory = out / _REPLACEMENT
    begun = _read_replacement(out)
    if begun is not None and not _is_of(begun, sources):
        begun = None
    return Place(out, directory, begun)


def prepare(place: Place) -> None:
    """Remove an unfinished replacement of another request.

    Args:
        place: Where this one is about to be written.
    """
    if place.directory != place.out and place.existing is None:
        shutil.rmtree(place.directory, ignore_errors=True)


def settle(place: Place) -> None:
    """Let what was made take the place of the data in OUT, within :func:`alone`.

    Args:
        place: Where the complete data is.

    Raises:
        OSError: A file cannot be renamed; the same command goes on there.
    """
    if place.directory != place.out:
        _swap(place.out)


def is_half_swapped(out: Path) -> bool:
    """Whether data is being replaced, or a process was killed in the middle of it.

    Args:
        out: The directory that the user named; it may be missing.
    """
    return (out / _REPLACEMENT / _REPLACED).is_dir()


def finish_swap(out: Path) -> None:
    """Finish replacing data where a process was killed in the middle of it.

    Args:
        out: The directory that the user named, within :func:`alone`.

    Raises:
        OSError: A file cannot be renamed.
    """
    if not is_half_swapped(out):
        return
    replacement = out / _REPLACEMENT
    if (out / INFO_FILE).exists() and not (replacement / INFO_FILE).exists():
        shutil.rmtree(replacement)
    elif not (out / INFO_FILE).exists() and (replacement / INFO_FILE).exists():
        _swap(out)


def alone(out: Path) -> AbstractContextManager[None]:
    """Keep other runs out of a directory for the length of a block.

    Args:
        out: The directory; created with its parents if missing.

    Returns:
        The block's context. Entering it raises an AdaDecodeError where another process
        is writing there, and an OSError where the directory cannot be created.
    """
    refusal = data_error(
        out,
        "another `adadecode data` is writing there",
        "wait until it has ended, or choose another directory",
        "OUT",
    )
    return locked(out, refusal)


def _swap(out: Path) -> None:
    """Move old data aside, then new data in; `dataset.json` goes first, comes last."""
    replacement = out / _REPLACEMENT
    replaced = replacement / _REPLACED
    all_aside = replaced / "all"
    replaced.mkdir(exist_ok=True)
    if not all_aside.exists():
        if (out / INFO_FILE).exists():
            (out / INFO_FILE).replace(replaced / INFO_FILE)
        for path in (*shard_files(out).values(), *_journals(out)):
            path.replace(replaced / path.name)
        all_aside.touch()
    for path in shard_files(replacement).values():
        path.replace(out / path.name)
    (replacement / INFO_FILE).replace(out / INFO_FILE)
    shutil.rmtree(replacement)


def _is_of(info: DatasetInfo, sources: Mapping[str, Any]) -> bool:
    """Whether data is of a request, token ids included where they are known."""
    names = [name for name in ("request", "ids") if name in sources]
    return all(info.sources.get(name) == sources[name] for name in names)


def _read_replacement(out: Path) -> DatasetInfo | None:
    """What an interrupted run has begun beside the data in OUT; None for nothing."""
    directory = out / _REPLACEMENT
    if not directory.exists():
        return None
    try:
        return read_info(directory, "OUT")
    except AdaDecodeError:
        if directory.is_dir() and not any(directory.iterdir()):
            return None
        raise data_error(
            out,
            f"its {_REPLACEMENT}, where the new data is to be made, holds other files",
            "move it away or choose another directory",
            "OUT",
        ) from None


def _read(out: Path, overwrite: bool) -> DatasetInfo | None:
    """`dataset.json` of OUT; None where there is none, or a broken one of ours."""
    if not (out / INFO_FILE).exists():
        return None
    try:
        return read_info(out, "OUT")
    except AdaDecodeError:
        # Shards of ours beside it tell whose it was.
        if overwrite and any(shard_request(path) for path in shard_files(out).values()):
            return None
        raise


def _has_rows(out: Path) -> bool:
    """Whether answers were made: in shards or in journals."""
    return bool(shard_files(out) or _journals(out))


def _journals(out: Path) -> list[Path]:
    """The journals in a directory."""
    return [path for path in out.iterdir() if JOURNAL_NAME.fullmatch(path.name)]


def _refuse_strangers(out: Path, overwrite: bool) -> None:
    """Refuse a directory with files of somebody else that could be taken for ours."""
    has_info = (out / INFO_FILE).exists()
    for path in shard_files(out).values():
        request = shard_request(path)
        # A damaged one among data of ours is made again.
        if request == "" or (request is None and not has_info):
            raise data_error(
                out,
                f"it holds {path.name}, which `adadecode data` did not write",
                "choose another directory",
                "OUT",
            )
    if has_info or overwrite:
        return
    for name in sorted(path.name for path in out.iterdir()):
        if without_temporary(name) not in (_REPLACEMENT, INFO_FILE):
            raise data_error(
                out,
                f"it holds {name} but no {INFO_FILE}",
                "choose another directory, or pass --overwrite to write there (only "
                "data of `adadecode data` is replaced)",
                "OUT",
            )


def _refuse_others(out: Path, request: str) -> None:
    """Refuse shards of other data that somebody has put beside those of a request."""
    for path in shard_files(out).values():
        if shard_request(path) not in (None, request):
            raise data_error(
                out,
                f"it holds {path.name} of other data than the rest",
                "move it away",
                "OUT",
            )


def _difference(existing: DatasetInfo, sources: Mapping[str, Any]) -> str:
    """Name what is not as it was."""
    if existing.sources.get("request") == sources["request"]:
        return (
            "the tokenizer or its chat template now makes other token ids; its "
            "dataset.json names the versions of then"
        )
    before = existing.sources.get("arguments", {})
    for name, now in sources["arguments"].items():
        if not isinstance(before, dict) or before.get(name) == now:
            continue
        if name == "model":
            return "another model, or its files have changed"
        return f"--{name} was {json.dumps(before.get(name))}, now {json.dumps(now)}"
    return "the input files are others, or have changed"
