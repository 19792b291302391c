# SPDX-License-Identifier: Apache-2.0
"""`adadecode doctor`: processors, their libraries, memory and CUDA devices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adadecode_vllm.toolkit.doctor import machine
from adadecode_vllm.toolkit.doctor.finding import Finding
from adadecode_vllm.toolkit.doctor.installation import Build
from adadecode_vllm.toolkit.doctor.machine import Device, find_device
from adadecode_vllm.toolkit.doctor.memory import default_requests
from tests.findings import GB, by_check


@pytest.mark.parametrize(
    ("line", "status", "text"),
    [
        ("flags : fpu avx2 avx512f avx512_bf16 amx_bf16", "ok", "bfloat16 and AMX"),
        ("flags : fpu avx2 avx512f avx512_bf16", "ok", "AVX-512 with bfloat16:"),
        ("flags\t\t: avx2 avx512f", "warning", "AVX-512 without bfloat16"),
        ("flags : avx2", "warning", "AVX2 without AVX-512"),
        ("Features : asimd bf16", "warning", "Neither AVX2 nor AVX-512"),
        ("", "warning", "Neither"),
    ],
)
def test_instructions(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    status: str,
    text: str,
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n{line}\n\nprocessor : 1\n")
    monkeypatch.setattr(machine, "PROC", tmp_path)
    finding = by_check(list(machine.check_cpu()))["CPU"]
    assert (finding.status, text in finding.text) == (status, True)


def test_few_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def threads(cores: int) -> Finding:
        monkeypatch.setattr(
            machine.os, "sched_getaffinity", lambda _: set(range(cores))
        )
        return by_check(list(machine.check_cpu()))["threads"]

    for name in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_NUM_OF_RESERVED_CPU"):
        monkeypatch.delenv(name, raising=False)
    assert threads(5).status == "ok"
    assert threads(4).status == "warning"
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU=0" in threads(2).remedy
    monkeypatch.setenv("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    assert threads(2).status == "ok"
    assert "VLLM_CPU_NUM_OF_RESERVED_CPU" in threads(2).text


def test_preloaded_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "_LIBRARIES", (tmp_path,))
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    monkeypatch.setattr(machine.sys, "prefix", str(tmp_path))
    monkeypatch.setenv("LD_PRELOAD", "")

    def preload() -> Finding:
        return by_check(list(machine.check_cpu()))["preload"]

    assert preload().status == "warning"
    assert "Install tcmalloc" in preload().remedy
    assert "pip install intel-openmp" in preload().remedy
    (tmp_path / "lib").mkdir()
    iomp, tcmalloc = tmp_path / "lib/libiomp5.so", tmp_path / "libtcmalloc.so.4"
    iomp.touch()
    tcmalloc.touch()
    assert preload().remedy == f"Start the server with LD_PRELOAD={tcmalloc}:{iomp}."
    monkeypatch.setenv("LD_PRELOAD", str(iomp))
    assert preload().remedy == f"Start the server with LD_PRELOAD={tcmalloc}."
    monkeypatch.setenv("LD_PRELOAD", f"{iomp}:{tcmalloc}")
    assert preload().status == "ok"


@pytest.mark.parametrize("version", [1, 2])
def test_memory_within_a_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int
) -> None:
    (tmp_path / "meminfo").write_text(
        "MemTotal:  16000000 kB\nMemFree: 1 kB\nMemAvailable:  9000000 kB\n"
    )
    monkeypatch.setattr(machine, "PROC", tmp_path)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    device, _ = find_device(Build("0.32.0", "cpu"))
    assert (device.total, device.available) == (16_000_000 << 10, 9_000_000 << 10)
    group, limit, used = tmp_path, "memory.max", "memory.current"
    if version == 1:
        group, limit = tmp_path / "memory", "memory.limit_in_bytes"
        used = "memory.usage_in_bytes"
        group.mkdir()
    (group / limit).write_text(f"{8 * GB}\n")
    (group / used).write_text(f"{5 * GB}\n")
    (group / "memory.stat").write_text(f"file 3\ninactive_file {2 * GB}\n")
    device, _ = find_device(Build("0.32.0", "cpu"))
    assert (device.total, device.available) == (8 * GB, 5 * GB)
    (group / limit).write_text("max\n")
    device, _ = find_device(Build("0.32.0", "cpu"))
    assert device.total == 16_000_000 << 10


def test_the_build_for_cuda_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, finding = find_device(Build("0.33.0", "cuda"))
    assert (device.kind, finding.status) == ("cuda", "problem")
    assert "torch sees no CUDA device" in finding.text


def test_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (60 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    device, finding = find_device(Build("0.33.0", "cuda"))
    assert device == Device("cuda", 80 * GB, 60 * GB)
    assert finding.text == "NVIDIA H100, 60.0 GB of 80.0 GB free."
    assert default_requests(device) == 1024
    assert default_requests(Device("cuda", 24 * GB, 24 * GB)) == 256
