# SPDX-License-Identifier: Apache-2.0
"""Imports run one way; docs/design.md draws the order."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.harness import ROOT

NAME = "adadecode_vllm"
# From below: a module imports from its own layer and from those before it. The first
# name that fits counts.
LAYERS = (
    ("errors", "files", "compat", "config", "remote_code", "request_options", ""),
    ("heads",),
    ("method",),
    ("engine", "patches"),  # a patch names our classes, and classes use patches
    ("live",),
    ("toolkit.progress", "toolkit.provenance", "toolkit.options", "toolkit.plotting"),
    ("toolkit.report",),
    ("toolkit.stats", "toolkit.publishing", "toolkit.data"),
    ("toolkit.states",),
    ("toolkit.evaluation",),
    ("toolkit.training",),
    ("toolkit", "vllm_cpu", "plugin", "cli"),
)
# Of vLLM, what it documents for those who use it, and types; the rest may move with any
# version, and so is known to these layers only.
KNOW_VLLM = ("compat", "engine", "patches")
PUBLIC = {
    "vllm",
    "vllm.config",
    "vllm.distributed",
    "vllm.engine.protocol",
    "vllm.sampling_params",
    "vllm.tasks",
}
DISK = {"os", "io", "pathlib", "shutil", "tempfile", "json", "safetensors"}


def _sources() -> Iterator[tuple[str, Path]]:
    for folder, prefix in ((NAME, NAME), ("patches", f"{NAME}.patches")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[0] == "patches":
                continue  # a link, where there is one
            if parts[-1] == "__init__":
                parts = parts[:-1]
            yield ".".join((prefix, *parts)), path


SOURCES = dict(_sources())


def _imported(path: Path) -> Iterator[str]:
    """Everything that a module imports, at whatever time and for types as well."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in SOURCES else node.module


IMPORTS = {name: set(_imported(path)) for name, path in SOURCES.items()}


def _layer(module: str) -> int:
    inner = module.removeprefix(NAME).removeprefix(".")
    for depth, names in enumerate(LAYERS):
        for name in names:
            if inner == name or (name and inner.startswith(f"{name}.")):
                return depth
    raise AssertionError(f"{module} has no layer; give it one")


def test_no_circle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_come_from_below(module: str) -> None:
    allowed = _layer(module)
    for imported in IMPORTS[module]:
        if imported.split(".")[0] == NAME and imported != NAME:
            assert _layer(imported) <= allowed, f"{module} imports {imported}"


def test_the_method_knows_neither_vllm_nor_the_disk() -> None:
    for module, imported in IMPORTS.items():
        if module.startswith(f"{NAME}.method"):
            roots = {name.split(".")[0] for name in imported}
            assert not roots & {"vllm", *DISK}, module


def test_few_know_the_inside_of_vllm() -> None:
    for module, imported in IMPORTS.items():
        if module.removeprefix(f"{NAME}.").startswith(KNOW_VLLM):
            continue
        known = {name for name in imported if name.split(".")[0] == "vllm"}
        assert known <= PUBLIC, f"{module} imports {known - PUBLIC}"
