# SPDX-License-Identifier: Apache-2.0
"""The machine: its device, its CPU's instructions, its allocator, its free memory."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from platform import machine

from adadecode_vllm.errors import first_line
from adadecode_vllm.toolkit.doctor.finding import Finding
from adadecode_vllm.toolkit.doctor.installation import Build

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")

# Where scripts/run.sh looks as well.
_LIBRARIES = (
    Path(f"/usr/lib/{machine()}-linux-gnu"),
    Path("/usr/lib64"),
    Path("/usr/lib"),
    Path("/usr/local/lib"),
)
_TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
_IOMP = "libiomp5.so"
# What decides how many CPUs vLLM computes on; by default all but one.
_THREADS = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU")
_FEW_CORES = 4


@dataclass(frozen=True)
class Device:
    """What a server of this environment would run on.

    Attributes:
        kind: ``cpu`` or ``cuda``.
        total: Its memory in bytes; 0 where it is not known.
        available: What of it is free, in bytes.
    """

    kind: str
    total: int
    available: int


def find_device(build: Build | None) -> tuple[Device, Finding]:
    """Look for the device that a build of vLLM is for.

    Args:
        build: The installed vLLM; None for none, which leaves the CPU.

    Returns:
        The device and what to say of it.
    """
    if build is None or build.device != "cuda":
        device = Device("cpu", *_host_memory())
        cores = len(os.sched_getaffinity(0))
        noun = "core" if cores == 1 else "cores"
        return device, Finding(
            "device",
            "ok",
            f"The CPU, of which this process may use {cores} {noun}.",
            figures={"kind": "cpu", "cores": cores},
        )
    try:
        import torch

        if torch.cuda.is_available():
            available, total = torch.cuda.mem_get_info()
            name = torch.cuda.get_device_name()
            return Device("cuda", total, available), Finding(
                "device",
                "ok",
                f"{name}, {gigabytes(available)} of {gigabytes(total)} free.",
                figures={"kind": "cuda", "name": name},
            )
        reason = "torch sees no CUDA device"
    except (ImportError, OSError, RuntimeError) as error:
        reason = f"torch does not work ({first_line(error)})"
    return Device("cuda", 0, 0), Finding(
        "device",
        "problem",
        f"This is vLLM's build for CUDA, and {reason}.",
        "Check `nvidia-smi` and CUDA_VISIBLE_DEVICES, or install "
        "`adadecode-vllm[cpu]` in an environment of its own.",
    )


def check_cpu() -> Iterator[Finding]:
    """Look at what a CPU that serves needs to be fast."""
    yield _instructions(_cpu_flags())
    yield _threads()
    yield _preload()


def _cpu_flags() -> set[str]:
    """Names of the instruction sets, as Linux spells them."""
    with suppress(OSError):
        text = (PROC / "cpuinfo").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE):
            return set(match[1].split())
    return set()


def _instructions(flags: set[str]) -> Finding:
    figures = {
        "avx2": "avx2" in flags,
        "avx512": "avx512f" in flags,
        "avx512_bf16": "avx512_bf16" in flags,
        "amx_bf16": "amx_bf16" in flags,
    }
    if figures["avx512"] and (figures["avx512_bf16"] or figures["amx_bf16"]):
        more = " and AMX" if figures["amx_bf16"] else ""
        return Finding(
            "CPU", "ok", f"AVX-512 with bfloat16{more}: any dtype.", figures=figures
        )
    if figures["avx512"]:
        return Finding(
            "CPU",
            "warning",
            "AVX-512 without bfloat16: whether early predictions pay in bfloat16 has "
            "not been measured on such a CPU.",
            "Compare with --dtype float32.",
            figures,
        )
    if figures["avx2"]:
        return Finding(
            "CPU",
            "warning",
            "AVX2 without AVX-512: in bfloat16 a matrix product costs as much for each "
            "further row, so verifying several tokens at once saves nothing.",
            "Serve with --dtype float32, where it does pay.",
            figures,
        )
    return Finding(
        "CPU",
        "warning",
        "Neither AVX2 nor AVX-512 was found, and early predictions have not been "
        "measured on such a CPU.",
        "Measure before you rely on a speedup.",
        figures,
    )


def _threads() -> Finding:
    """Whether vLLM leaves a large share of few CPUs to its scheduler."""
    cores = len(os.sched_getaffinity(0))
    figures = {"cores": cores}
    if chosen := [name for name in _THREADS if name in os.environ]:
        text = f"{' and '.join(chosen)} decides how many of {cores} CPUs compute."
        return Finding("threads", "ok", text, figures=figures)
    if cores > _FEW_CORES:
        text = f"Of {cores} CPUs vLLM keeps one for its scheduler."
        return Finding("threads", "ok", text, figures=figures)
    return Finding(
        "threads",
        "warning",
        f"Of {cores} CPUs vLLM keeps one for its scheduler. Computing on all can be "
        "much faster, and verifying several tokens at once is cheaper then.",
        "Start the server with VLLM_CPU_NUM_OF_RESERVED_CPU=0.",
        figures,
    )


def _preload() -> Finding:
    """Whether the libraries are preloaded that vLLM recommends on CPUs."""
    preloaded = os.environ.get("LD_PRELOAD", "")
    paths: dict[str, str | None] = {"tcmalloc": _find_tcmalloc()}
    if machine() in ("x86_64", "AMD64"):
        paths["libiomp"] = _find_iomp()
    missing = [name for name in paths if name not in preloaded]
    figures = {name: name not in missing for name in paths}
    if not missing:
        return Finding(
            "preload", "ok", f"Preloaded: {' and '.join(paths)}.", figures=figures
        )
    found = [path for name in missing if (path := paths[name]) is not None]
    steps = []
    if "tcmalloc" in missing and paths["tcmalloc"] is None:
        steps.append("install tcmalloc (Debian: libtcmalloc-minimal4)")
    if "libiomp" in missing and paths["libiomp"] is None:
        steps.append("install Intel's OpenMP runtime (`pip install intel-openmp`)")
    if found:
        steps.append(f"start the server with LD_PRELOAD={':'.join(found)}")
    else:
        steps.append("start the server with it in LD_PRELOAD")
    remedy = ", and ".join(steps)
    slower = "much slower" if "libiomp" in missing else "slower"
    return Finding(
        "preload",
        "warning",
        f"Not in LD_PRELOAD of this process: {' and '.join(missing)}. Texts are the "
        f"same without, but vLLM warns that decoding with drafts is {slower}.",
        f"{remedy[0].upper()}{remedy[1:]}.",
        figures,
    )


def _find_tcmalloc() -> str | None:
    for directory in _LIBRARIES:
        for name in _TCMALLOC:
            if (directory / name).exists():
                return str(directory / name)
    spec = find_spec("vllm")  # some builds bring it
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(place, "libs").glob("libtcmalloc*.so*")):
            return str(path)
    return None


def _find_iomp() -> str | None:
    path = Path(sys.prefix, "lib", _IOMP)
    return str(path) if path.exists() else None


def _host_memory() -> tuple[int, int]:
    """Total and available memory in bytes, within this process's control group."""
    total = available = 0
    with suppress(OSError):
        text = (PROC / "meminfo").read_text(encoding="utf-8")
        sizes = dict(re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE))
        total = 1024 * int(sizes.get("MemTotal", 0))
        available = 1024 * int(sizes.get("MemAvailable", 0))
    for group, limit_file, used_file in (
        (CGROUP, "memory.max", "memory.current"),
        (CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # ValueError: `max`, which is no limit
            limit = int((group / limit_file).read_text())
            used = int((group / used_file).read_text())
            # Files in the page cache count as used, and are given up when asked for.
            stat = re.search(
                r"^inactive_file (\d+)$",
                (group / "memory.stat").read_text(),
                re.MULTILINE,
            )
            used -= int(stat[1]) if stat else 0
            if limit < total:
                total, available = limit, max(min(available, limit - used), 0)
    return total, available


def gigabytes(size: float) -> str:
    """Format a number of bytes, such as `25.2 MB` or `16.1 GB`."""
    if size < 1e9:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.1f} GB"
