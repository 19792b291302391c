# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint's small files say of a model; its weights are not loaded."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adadecode_vllm.engine.families import SUPPORTED_ARCHITECTURES
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads.hub import download_model
from adadecode_vllm.toolkit.doctor.finding import Finding

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element, by the names that configurations use."""

_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelFacts:
    """A model, as far as its configuration tells.

    Attributes:
        name: As the user gave it.
        directory: Its checkpoint's, or what of it is on this machine.
        architectures: Hugging Face names.
        hidden_size: d.
        vocab_size: Rows of the LM head.
        num_hidden_layers: Decoder layers.
        dtype: Of the checkpoint.
        weight_bytes: Of all its weights as they are stored; 0 if that is not known.
    """

    name: str
    directory: Path
    architectures: tuple[str, ...]
    hidden_size: int
    vocab_size: int
    num_hidden_layers: int
    dtype: str
    weight_bytes: int

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of the weights."""
        return DTYPE_BYTES.get(self.dtype, 2)


def read_model(name: str) -> ModelFacts:
    """Read a model's configuration.

    Args:
        name: A directory, or a name on the Hugging Face Hub, from which only small
            files are fetched.

    Returns:
        What it says.

    Raises:
        AdaDecodeError: There is no such model, or it is no language model.
    """
    directory = Path(name)
    if not directory.is_dir():
        directory = _small_files(name)
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        text = {**config, **(config.get("text_config") or {})}
        return ModelFacts(
            name=name,
            directory=directory,
            architectures=tuple(config.get("architectures") or ()),
            hidden_size=int(text["hidden_size"]),
            vocab_size=int(text["vocab_size"]),
            num_hidden_layers=int(text["num_hidden_layers"]),
            dtype=str(text.get("dtype") or text.get("torch_dtype") or "float32"),
            weight_bytes=_weight_bytes(directory),
        )
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise AdaDecodeError(
            f"MODEL {name}: its config.json is not that of a language model "
            f"({reason}); give a model in the Hugging Face layout"
        ) from error


def check_architecture(model: ModelFacts) -> Finding:
    """Whether vLLM's implementation of the model is one that early exits know."""
    names = ", ".join(model.architectures) or "no architecture"
    figures = {
        "architectures": list(model.architectures),
        "layers": model.num_hidden_layers,
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "dtype": model.dtype,
    }
    if SUPPORTED_ARCHITECTURES.isdisjoint(model.architectures):
        return Finding(
            "model",
            "problem",
            f"{model.name} ({names}) is not of a supported family.",
            f"Serve one of {', '.join(sorted(SUPPORTED_ARCHITECTURES))}.",
            figures,
        )
    return Finding(
        "model",
        "ok",
        f"{names}, {model.num_hidden_layers} layers, hidden size {model.hidden_size}, "
        f"vocabulary {model.vocab_size:,}, {model.dtype}.",
        figures=figures,
    )


def _small_files(name: str) -> Path:
    """A model of the Hub: all of it where it was downloaded before, or little."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # Whatever is wrong, downloading says it.
    with suppress(HfHubHTTPError, OSError, ValueError):
        return Path(snapshot_download(name, local_files_only=True))
    return download_model(name, ["config.json", _INDEX])


def _weight_bytes(directory: Path) -> int:
    """Bytes of the checkpoint's weights."""
    index = directory / _INDEX
    if index.is_file():
        values: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        return int(values.get("metadata", {}).get("total_size", 0))
    return sum(path.stat().st_size for path in directory.glob("model*.safetensors"))
