# SPDX-License-Identifier: Apache-2.0
"""Which heads belong to a model: a small registry beside this file, and a user's own.

A registry is a JSON file. Every entry names models, and heads in a directory or in a
repository on the Hub. Nothing here fetches anything: heads of the Hub are only named.
"""

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adadecode_vllm.errors import AdaDecodeError, problems
from adadecode_vllm.heads.config import load_heads_config
from adadecode_vllm.heads.files import CONFIG_FILE
from adadecode_vllm.heads.fingerprint import LMHeadRows, read_lm_head, same_lm_head

logger = logging.getLogger(__name__)

REGISTRY_VARIABLE: Final = "ADADECODE_REGISTRY"
"""Environment variable with the path of a registry of the user's, which comes first."""

SHIPPED: Final = Path(__file__).parent / "shipped" / "registry.json"

_Name = Annotated[str, Field(min_length=1)]


class RegistryEntry(BaseModel):
    """Heads and the models that they belong to.

    Attributes:
        models: Names on the Hub, or directories.
        directory: Of the heads; a relative one, here and in `models`, begins at the
            registry's directory.
        repository: Of the heads on the Hub, `namespace/name` or
            `namespace/name@revision`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    models: Annotated[list[_Name], Field(min_length=1)]
    directory: _Name | None = None
    repository: _Name | None = None

    @model_validator(mode="after")
    def _check_heads(self) -> "RegistryEntry":
        """The heads are in one place."""
        if (self.directory is None) == (self.repository is None):
            raise ValueError("give directory or repository, one of them")
        return self


class _Registry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    heads: list[RegistryEntry]


@dataclass(frozen=True)
class RegisteredHeads:
    """Heads that belong to a model.

    Attributes:
        registry: The file that names them.
        directory: Where they are; None for those on the Hub.
        repository: Their name on the Hub; None for those in a directory.
    """

    registry: Path
    directory: Path | None
    repository: str | None


def find_registered_heads(model: str) -> RegisteredHeads | None:
    """Look up the heads of a model.

    A model's name or directory is compared with those in the registries. A directory
    that none of them names may be a copy of a model that one does: its LM head is
    compared with those that the registered heads of directories were made for.

    Args:
        model: A directory, or a name on the Hub.

    Returns:
        The first heads that belong to it, those of the user's own registry before those
        that are shipped; None if there are none.

    Raises:
        AdaDecodeError: The user's registry cannot be read.
    """
    entries = [(path, entry) for path in _registries() for entry in _read(path).heads]
    is_directory = Path(model).is_dir()
    for path, entry in entries:
        if any(_is_named(model, is_directory, name, path) for name in entry.models):
            return _found(path, entry)
    if is_directory and (lm_head := read_lm_head(model)) is not None:
        layers = _num_hidden_layers(Path(model))
        for path, entry in entries:
            found = _found(path, entry)
            if found.directory is not None and _made_for(
                found.directory, lm_head, layers
            ):
                return found
    return None


def _registries() -> list[Path]:
    own = os.environ.get(REGISTRY_VARIABLE)
    return [Path(own), SHIPPED] if own else [SHIPPED]


def _read(path: Path) -> _Registry:
    try:
        return _Registry.model_validate_json(path.read_bytes())
    except OSError as error:
        reason = error.strerror or str(error)
    except ValidationError as error:
        reason = problems(error)[0]
    raise AdaDecodeError(
        f"{REGISTRY_VARIABLE} {path}: it is not a registry of heads ({reason}). "
        "Correct the file or the path, or unset the variable."
    )


def _is_named(model: str, is_directory: bool, name: str, registry: Path) -> bool:
    """Whether a registry's name for a model is that of this one."""
    if is_directory:
        return (registry.parent / name).resolve() == Path(model).resolve()
    return model.casefold() == name.casefold()


def _found(registry: Path, entry: RegistryEntry) -> RegisteredHeads:
    directory = None
    if entry.directory is not None:
        directory = (registry.parent / entry.directory).absolute()
    return RegisteredHeads(registry, directory, entry.repository)


def _made_for(directory: Path, lm_head: LMHeadRows, layers: int | None) -> bool:
    """Whether heads were made for an LM head of a model with so many layers."""
    try:
        heads = load_heads_config(directory)
    except AdaDecodeError as error:  # of some other model, perhaps
        logger.warning("Left out of the search for heads: %s", error)
        return False
    return (
        (heads.vocab_size, heads.hidden_size)
        == (lm_head.vocab_size, lm_head.hidden_size)
        and layers in (None, heads.num_hidden_layers)
        and same_lm_head(heads.lm_head_fingerprint, lm_head.fingerprint)
    )


def _num_hidden_layers(model: Path) -> int | None:
    """Decoder layers of a checkpoint; None where its configuration does not tell."""
    try:
        values: Any = json.loads((model / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    found = values.get("num_hidden_layers") if isinstance(values, dict) else None
    return found if isinstance(found, int) else None
