# SPDX-License-Identifier: Apache-2.0
"""What is fetched from the Hub; `from_pretrained` has huggingface_hub's arguments.

From a repository of heads only `config.json`, `model.safetensors` and `README.md` are
ever fetched, and the weights only once the configuration has turned out to be that of
exit heads.
"""

import json
from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path

from adadecode_vllm import __version__
from adadecode_vllm.errors import AdaDecodeError, first_line
from adadecode_vllm.heads.config import MODEL_TYPE
from adadecode_vllm.heads.files import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    config_path,
    heads_error,
)
from adadecode_vllm.heads.hub_errors import explained

LIBRARY = "adadecode-vllm"


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `namespace/name` of a repository on the Hub.

    Args:
        name: A name or a path.

    Returns:
        Whether it could be one; it is not looked up.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    # One slash: what has none is a directory here. The validator forbids a second.
    if "/" not in name or name.startswith(("/", ".", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def download_model(model: str, patterns: Sequence[str]) -> Path:
    """Download files of a base model, or find them downloaded.

    Args:
        model: The name of a repository on the Hub.
        patterns: Which of its files, such as `*.json`.

    Returns:
        The directory in the cache.

    Raises:
        AdaDecodeError: There is no such repository, or the Hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=list(patterns)))
    # Not narrower: the errors of the HTTP client derive from nothing else.
    except Exception as error:
        raise AdaDecodeError(
            f"MODEL {model}: neither a local directory nor a repository that the "
            f"Hugging Face Hub gave ({first_line(error)}); check the name, the "
            "connection and your access to the model"
        ) from error


def pin_heads(name_or_path: str | PathLike[str]) -> tuple[str, Path]:
    """Find what `--adadecode-heads` names, so that other machines find the same.

    Args:
        name_or_path: See `resolve_heads`.

    Returns:
        What to give `resolve_heads` in another process: the absolute path of a
        directory, or `namespace/name@commit` of a repository, which each machine has in
        a cache of its own. Then the directory of this machine.

    Raises:
        AdaDecodeError: There is no such directory or repository.
    """
    directory = resolve_heads(name_or_path)
    if Path(name_or_path).exists():
        return str(directory.absolute()), directory
    repo_id = str(name_or_path).partition("@")[0]
    return f"{repo_id}@{directory.name}", directory  # a snapshot is named by its commit


def resolve_heads(name_or_path: str | PathLike[str]) -> Path:
    """Return the local directory of what `--adadecode-heads` names.

    Args:
        name_or_path: A directory, or a repository on the Hub: `namespace/name`, or
            `namespace/name@revision`. A directory of exactly that name wins.

    Returns:
        The directory. It is checked by `load_heads_config`, not here.

    Raises:
        AdaDecodeError: There is no such directory or repository.
    """
    name = str(name_or_path)
    repo_id, at, revision = name.partition("@")
    if at and revision and not Path(name).exists() and is_hub_id(repo_id):
        return _download(repo_id, revision)
    return from_pretrained(name_or_path)


def from_pretrained(
    name_or_path: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return a local heads directory, downloading it if need be.

    Args:
        name_or_path: A directory, or a repository on the Hub, `namespace/name`. A
            directory that exists wins.
        revision: Branch, tag or commit of the repository; None for its main branch.
        token: Access token; None for the one that `hf auth login` saved, False for
            none.
        cache_dir: Where downloads are kept; None for huggingface_hub's own cache.
        local_files_only: Never connect; use what was downloaded before.

    Returns:
        The directory given, or that in the cache. The files are checked by
        `load_heads_config`, not here.

    Raises:
        AdaDecodeError: There is no such directory or repository, the Hub cannot be
            reached, or the repository holds no exit heads.
    """
    directory = Path(name_or_path)
    name = str(name_or_path)
    if directory.exists() or not is_hub_id(name):
        config_path(directory)  # explains what is wrong with a path
        return directory
    return _download(name, revision, token, cache_dir, local_files_only)


def _download(
    repo_id: str,
    revision: str | None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The snapshot of a repository in the cache; see `from_pretrained`."""
    from huggingface_hub import snapshot_download

    name = Path(repo_id)  # as errors show it

    def fetch(files: list[str], revision: str | None) -> Path:
        with explained(partial(heads_error, name), revision):
            snapshot = snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else str(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=files,
                library_name=LIBRARY,
                library_version=__version__,
            )
        return Path(snapshot)

    snapshot = fetch([CONFIG_FILE], revision)
    _check_model_type(name, snapshot)
    # The snapshot is named by its commit: the weights must be of the same.
    snapshot = fetch([WEIGHTS_FILE, CARD_FILE, CONFIG_FILE], snapshot.name)
    if not (snapshot / WEIGHTS_FILE).is_file():
        raise heads_error(
            name,
            f"the repository holds no {WEIGHTS_FILE}, and only safetensors are loaded",
            "name a repository whose weights are safetensors",
        )
    return snapshot


def _check_model_type(directory: Path, snapshot: Path) -> None:
    """Refuse a repository of something else before its weights are fetched."""
    try:
        values = json.loads((snapshot / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        values = None
    except (OSError, ValueError, RecursionError) as error:
        raise heads_error(
            directory,
            f"{CONFIG_FILE} of the repository is not JSON ({first_line(error)})",
            "name a repository of exit heads",
        ) from error
    found = values.get("model_type") if isinstance(values, dict) else None
    if found != MODEL_TYPE:
        what = f"no {CONFIG_FILE}" if values is None else f"model_type {found!r}"
        raise heads_error(
            directory,
            f"the repository has {what} instead of model_type {MODEL_TYPE!r}",
            "name a repository of exit heads, not of a model",
        )
