# SPDX-License-Identifier: Apache-2.0
"""A fingerprint of the LM head: are these heads for this base model?

Heads work only with the LM head they were made for; with another one nothing fails, the
early predictions are merely useless. The fingerprint must therefore be computable

- from a checkpoint without reading all of a head of several GB,
- from a loaded model whose vocabulary is sharded over tensor-parallel ranks,
- and tell a quantized or rounded LM head, which the heads fit as well, from another.

It samples 16 rows evenly over the vocabulary (row i * (V - 1) // 15) and notes for each
on which side of 64 random hyperplanes it lies (Charikar's hashing, STOC 2002):
`sim64x16:` and 16 times 16 hex digits. Two rows differ in a share of these bits that is
their angle over pi: rounding to bfloat16 changes none or one, four-bit quantization two
or so, and a row of another model half of the 64.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

logger = logging.getLogger(__name__)

_PREFIX = "sim64x16:"
_ROWS = 16
_BITS = 64
# An angle of 45 degrees. Of unrelated rows one pair in 20,000 is as close.
_MOST_DIFFERENT = 16
_LM_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"
_FLOAT_DTYPES = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class LMHeadRows:
    """The rows of a checkpoint's LM head that the fingerprint needs.

    Attributes:
        vocab_size: Rows of the whole LM head.
        hidden_size: Columns of it.
        rows: The sampled rows, shape (16, d), in the checkpoint's dtype.
    """

    vocab_size: int
    hidden_size: int
    rows: torch.Tensor

    @property
    def fingerprint(self) -> str:
        """The fingerprint, equal to `lm_head_fingerprint` of the whole LM head."""
        return _PREFIX + "-".join(f"{sketch:016x}" for sketch in _sketches(self.rows))


def lm_head_fingerprint(weight: torch.Tensor) -> str:
    """Compute the fingerprint of a whole LM head.

    Args:
        weight: Shape (V, d), without padding rows, any floating dtype and device.

    Returns:
        `sim64x16:` and 16 groups of 16 hex digits, joined by `-`.
    """
    vocab_size, hidden_size = weight.shape
    rows = weight[_sampled_rows(vocab_size)]
    return LMHeadRows(vocab_size, hidden_size, rows).fingerprint


def check_fingerprint(
    fingerprint: str, weight_shard: torch.Tensor, first_row: int, vocab_size: int
) -> bool:
    """Compare a fingerprint with a vocabulary shard of a loaded LM head.

    Only sampled rows in [first_row, first_row + len(weight_shard)) are compared, so the
    verdict of all ranks together is that of the whole. A shard's padding rows, beyond
    `vocab_size`, are never sampled.

    Args:
        fingerprint: The heads' fingerprint.
        weight_shard: Shape (rows, d).
        first_row: The shard's first row in the whole LM head.
        vocab_size: Rows V of the whole LM head without padding.

    Returns:
        False if a row is another one. A row of zeros is not judged: it may have been
        too small for the shard's dtype.

    Raises:
        ValueError: The fingerprint is malformed.
    """
    expected = _parse(fingerprint)
    end_row = first_row + len(weight_shard)
    sampled = [
        (row - first_row, sketch)
        for row, sketch in zip(_sampled_rows(vocab_size), expected, strict=True)
        if first_row <= row < end_row
    ]
    if not sampled:
        return True
    found = _sketches(weight_shard[[row for row, _ in sampled]])
    return _alike([sketch for _, sketch in sampled], found)


def same_lm_head(fingerprint: str, other: str) -> bool:
    """Compare two fingerprints.

    Args:
        fingerprint: Of one LM head.
        other: Of another, or of the same in another dtype or quantized.

    Returns:
        Whether they are of the same LM head; see `check_fingerprint`.

    Raises:
        ValueError: One is malformed.
    """
    return _alike(_parse(fingerprint), _parse(other))


def read_lm_head(model_dir: str | PathLike[str]) -> LMHeadRows | None:
    """Read the fingerprint's rows from a local Hugging Face checkpoint.

    Args:
        model_dir: Directory with `config.json` and `model.safetensors`, or shards and
            `model.safetensors.index.json`.

    Returns:
        The rows of `lm_head.weight`, or of the embedding where the two are tied or the
        checkpoint has no LM head. None where there is no readable safetensors
        checkpoint or the LM head is quantized.
    """
    model_dir = Path(model_dir)
    try:
        files = _tensor_files(model_dir)
        name = _lm_head_name(model_dir, files)
        if name is None:
            return None
        with safe_open(files[name], framework="pt") as tensors:
            weight = tensors.get_slice(name)
            shape = weight.get_shape()
            if weight.get_dtype() not in _FLOAT_DTYPES or len(shape) != 2:
                return None
            vocab_size, hidden_size = shape
            sampled = [weight[row : row + 1] for row in _sampled_rows(vocab_size)]
            return LMHeadRows(vocab_size, hidden_size, torch.cat(sampled))
    except (OSError, ValueError, SafetensorError) as error:
        logger.warning("The LM head in %s cannot be read: %s", model_dir, error)
        return None


def _sampled_rows(vocab_size: int) -> list[int]:
    """Return the 16 sampled rows; small vocabularies repeat some."""
    return [i * (vocab_size - 1) // (_ROWS - 1) for i in range(_ROWS)]


def _parse(fingerprint: str) -> list[int]:
    groups = fingerprint.removeprefix(_PREFIX).split("-")
    if not fingerprint.startswith(_PREFIX) or len(groups) != _ROWS:
        raise ValueError(f"malformed LM head fingerprint {fingerprint!r}")
    return [int(group, 16) for group in groups]


def _alike(expected: list[int], found: list[int]) -> bool:
    """Whether all rows are the same ones; 0 is the sketch of a row of zeros."""
    return all(
        not one or not other or (one ^ other).bit_count() <= _MOST_DIFFERENT
        for one, other in zip(expected, found, strict=True)
    )


def _sketches(rows: torch.Tensor) -> list[int]:
    """Of rows (n, d), the sides of the hyperplanes as integers of 64 bits."""
    values = rows.detach().to("cpu", torch.float64).numpy()
    sides = values @ _hyperplanes(values.shape[1]) > 0
    packed = np.packbits(sides, axis=1)
    return [int.from_bytes(row.tobytes(), "big") for row in packed]


@lru_cache
def _hyperplanes(hidden_size: int) -> np.ndarray:
    """Normals of shape (d, 64), of 1 and -1; the same on every machine, for ever."""
    stream = hashlib.shake_256(b"adadecode LM head").digest(_BITS * hidden_size // 8)
    bits = np.unpackbits(np.frombuffer(stream, np.uint8)).reshape(hidden_size, _BITS)
    return np.where(bits, 1.0, -1.0)


def _tensor_files(model_dir: Path) -> dict[str, Path]:
    """Map the checkpoint's tensor names to their files."""
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = _read_json(index)["weight_map"]
        return {name: model_dir / file for name, file in weight_map.items()}
    single = model_dir / "model.safetensors"
    if not single.is_file():
        return {}
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _lm_head_name(model_dir: Path, files: dict[str, Path]) -> str | None:
    """Return the name of the tensor that serves as LM head, None if there is none."""
    tied = bool(_read_json(model_dir / "config.json").get("tie_word_embeddings"))
    if not tied:
        if _LM_HEAD in files:
            return _LM_HEAD
        # `lm_head.qweight` and the like: a quantized head has no rows to compare.
        if any(name.startswith("lm_head.") for name in files):
            return None
    return _EMBEDDING if _EMBEDDING in files else None


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return values
