# SPDX-License-Identifier: Apache-2.0
"""Where an evaluation goes: never over the files of somebody else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.files import atomic_write
from adadecode_vllm.toolkit.report import parse_evaluation
from adadecode_vllm.toolkit.report.write import REPORT_FILES

EVALUATION_FILE = "evaluation.json"


def check_evaluation_output(output: Path, *, plots: bool) -> None:
    """Refuse a directory whose files are not those of an evaluation; only reads.

    Args:
        output: Where the evaluation is to be written; it may be missing.
        plots: Whether the report is written as well.

    Raises:
        AdaDecodeError: It is a file or would be in one, or holds files of the same
            names without being the output of an evaluation.
        OSError: Its name is one that no directory can have.
    """
    if output.exists() and not output.is_dir():
        raise AdaDecodeError(
            f"--output {output}: the path is a file; give the name of a directory"
        )
    there = next(parent for parent in output.absolute().parents if parent.exists())
    if not there.is_dir():
        raise AdaDecodeError(
            f"--output {output}: {there} is a file; give the name of a directory"
        )
    if _is_evaluation(output / EVALUATION_FILE):
        return
    for name in (EVALUATION_FILE, *(REPORT_FILES if plots else ())):
        if (output / name).exists():
            raise AdaDecodeError(
                f"--output {output}: it holds {name}, which no evaluation wrote; give "
                "another directory, so that nothing is lost"
            )


def write_evaluation(output: Path, report: Mapping[str, Any]) -> Path:
    """Write ``evaluation.json``, in one step.

    Args:
        output: The directory; created if missing.
        report: What :func:`~adadecode_vllm.toolkit.evaluation.run.evaluate_heads`
            returned.

    Returns:
        The file.

    Raises:
        OSError: It cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1) + "\n"
    return atomic_write(output / EVALUATION_FILE, text.encode())


def _is_evaluation(path: Path) -> bool:
    """Whether a file is an ``evaluation.json`` that was written here."""
    if not path.is_file():
        return False
    try:
        parse_evaluation(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, AdaDecodeError):
        return False
    return True
