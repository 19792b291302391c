# SPDX-License-Identifier: Apache-2.0
"""The heads directory: every refusal by its sentence, and links that are allowed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adadecode_vllm import __version__
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import load_heads_config, load_tensors
from tests.published_heads import D


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(directory: Path, **values: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors."""
    path = directory / "model.safetensors"
    tensors = load_file(path) | values
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(content)


def rename_weights(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / "model.safetensors").rename(directory / name)


def truncate(size: int) -> Callable[[Path], None]:
    return lambda directory: os.truncate(directory / "model.safetensors", size)


def link_outside(name: str) -> Callable[[Path], None]:
    def move_and_link(directory: Path) -> None:
        outside = directory.parent / f"outside-{name}"
        (directory / name).rename(outside)
        (directory / name).symlink_to(outside)

    return move_and_link


def dangling_link(name: str) -> Callable[[Path], None]:
    def replace(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).symlink_to("gone")

    return replace


def pickled(directory: Path) -> None:
    torch.save({"w": torch.eye(D)}, directory / "model.safetensors")


def config_values(**values: Any) -> Callable[[Path], None]:
    return lambda directory: edit_config(directory, **values)


def tensors(**values: torch.Tensor | None) -> Callable[[Path], None]:
    named = {name.replace("__", "."): value for name, value in values.items()}
    return lambda directory: edit_weights(directory, **named)


REFUSALS = [
    pytest.param(shutil.rmtree, "the path does not exist", id="no directory"),
    pytest.param(
        lambda d: (shutil.rmtree(d), d.write_text("")),
        "the path is not a directory",
        id="a file",
    ),
    pytest.param(remove("config.json"), "config.json is missing", id="no config"),
    pytest.param(write("config.json", b"{"), "config.json is not JSON", id="not JSON"),
    pytest.param(
        write("config.json", b"\xff\xfe"), "config.json is not JSON", id="not UTF-8"
    ),
    pytest.param(
        write("config.json", b"[]"), "config.json is not a JSON object", id="a list"
    ),
    pytest.param(
        config_values(model_type="llama"),
        "model_type 'llama' instead of 'adadecode'; give a directory of exit heads",
        id="a model",
    ),
    pytest.param(
        config_values(novel=1, library_version="9.0.0"),
        "unknown key 'novel' (written by adadecode-vllm 9.0.0, this is "
        f"{__version__}); install the version that wrote it",
        id="unknown key",
    ),
    pytest.param(
        config_values(exit_layers=[3, 1]),
        "exit_layers must be strictly increasing, not [3, 1]",
        id="decreasing exits",
    ),
    pytest.param(
        config_values(exit_layers=[1, 1]), "strictly increasing", id="equal exits"
    ),
    pytest.param(
        config_values(exit_layers=[-1, 3]),
        "exit_layers contains -1, but the model's 4 layers allow 0 to 3",
        id="exit -1",
    ),
    pytest.param(
        config_values(exit_layers=[1, 4]), "exit_layers contains 4", id="exit L"
    ),
    pytest.param(config_values(exit_layers=[]), "invalid: exit_layers:", id="no exits"),
    pytest.param(
        config_values(exit_layers=["1", "3"]), "exit_layers.0: ", id="exits as text"
    ),
    pytest.param(config_values(hidden_size=0), "invalid: hidden_size:", id="no width"),
    pytest.param(config_values(dtype="int8"), "invalid: dtype:", id="unknown dtype"),
    pytest.param(
        config_values(lm_head_fingerprint="md5:0"),
        "invalid: lm_head_fingerprint:",
        id="malformed fingerprint",
    ),
    pytest.param(
        remove("model.safetensors"), "model.safetensors is missing", id="no weights"
    ),
    *(
        pytest.param(
            rename_weights(name),
            f"holds {name} but no model.safetensors; "
            "only safetensors are loaded, never pickle; convert the weights",
            id=f"pickle {name}",
        )
        for name in ("pytorch_model.bin", "heads.pt", "heads.pth")
    ),
    pytest.param(
        pickled, "only safetensors are loaded, never pickle", id="pickle in disguise"
    ),
    pytest.param(
        write("model.safetensors", b"\0" * 64),
        "is not a safetensors file",
        id="not safetensors",
    ),
    *(
        pytest.param(
            truncate(size),
            "model.safetensors is truncated or damaged",
            id=f"truncated to {size}",
        )
        for size in (0, 8, 40, 300)
    ),
    *(
        pytest.param(
            link_outside(name),
            f"{name} is a link that leaves the directory; copy the file",
            id=f"linked {name}",
        )
        for name in ("config.json", "model.safetensors")
    ),
    *(
        pytest.param(
            dangling_link(name), f"{name} is a broken link", id=f"dangling {name}"
        )
        for name in ("config.json", "model.safetensors")
    ),
    pytest.param(
        config_values(memory=True),
        "model.safetensors lacks exit_heads.1.memory, exit_heads.3.memory",
        id="no memory",
    ),
    pytest.param(
        tensors(exit_heads__3__memory=torch.eye(D)),
        "model.safetensors holds the unexpected exit_heads.3.memory",
        id="memory unsaid",
    ),
    pytest.param(
        tensors(exit_heads__3__weight=None),
        "model.safetensors lacks exit_heads.3.weight",
        id="missing tensor",
    ),
    pytest.param(
        tensors(exit_heads__2__weight=torch.eye(D)),
        "model.safetensors holds the unexpected exit_heads.2.weight",
        id="unexpected tensor",
    ),
    pytest.param(
        tensors(exit_heads__3__weight=torch.zeros(D, D + 1)),
        "exit_heads.3.weight has shape (8, 9) instead of (8, 8)",
        id="wrong shape",
    ),
    pytest.param(
        tensors(exit_heads__1__weight=torch.eye(D, dtype=torch.bfloat16)),
        "exit_heads.1.weight has dtype BF16 instead of F32",
        id="wrong dtype",
    ),
]


@pytest.mark.parametrize(("damage", "message"), REFUSALS)
def test_refusal(heads: Path, damage: Callable[[Path], object], message: str) -> None:
    load_heads_config(heads)
    damage(heads)
    with pytest.raises(AdaDecodeError) as caught:
        load_heads_config(heads)
    text = str(caught.value)
    assert message in text
    assert text.startswith(f"--adadecode-heads {heads}: ")
    assert "\n" not in text
    assert "; " in text  # the remedy


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_load_refuses_weights_that_are_not_finite(heads: Path, value: float) -> None:
    weight = torch.eye(D)
    weight[2, 5] = value
    edit_weights(heads, **{"exit_heads.3.weight": weight})
    config = load_heads_config(heads)
    with pytest.raises(AdaDecodeError, match=r"exit_heads\.3\.weight holds NaN"):
        load_tensors(heads, config)


def test_unreadable_file_is_a_sentence(
    heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*args: Any, **kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", denied)
    with pytest.raises(AdaDecodeError, match=r"cannot be read \(Permission denied\)"):
        load_heads_config(heads)


# Links that are allowed


def test_links_of_the_hugging_face_cache_are_followed(
    heads: Path, tmp_path: Path
) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "revision"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, name in enumerate(("config.json", "model.safetensors")):
        (heads / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    config = load_heads_config(snapshot)
    assert list(load_tensors(snapshot, config).weights) == [1, 3]


def test_a_blobs_directory_elsewhere_is_refused(heads: Path, tmp_path: Path) -> None:
    # heads/../../blobs has the right relative place, but this is no snapshot.
    blobs = tmp_path.parent / "blobs"
    blobs.mkdir(exist_ok=True)
    (heads / "config.json").rename(blobs / "config.json")
    (heads / "config.json").symlink_to(blobs / "config.json")
    with pytest.raises(AdaDecodeError, match="leaves the directory"):
        load_heads_config(heads)


def test_the_directory_itself_may_be_a_link(heads: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(heads)
    assert load_heads_config(tmp_path / "latest").exit_layers == [1, 3]


def test_a_link_within_the_directory_is_followed(heads: Path) -> None:
    (heads / "step-1").mkdir()
    (heads / "model.safetensors").rename(heads / "step-1" / "model.safetensors")
    (heads / "model.safetensors").symlink_to("step-1/model.safetensors")
    assert load_heads_config(heads).exit_layers == [1, 3]
