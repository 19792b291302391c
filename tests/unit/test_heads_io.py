# SPDX-License-Identifier: Apache-2.0
"""The heads directory: round trips, and every refusal by its sentence."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from adadecode_vllm import __version__
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import ExitHeads, load_heads_config, load_tensors, save_heads
from adadecode_vllm.heads.output import check_output, holds_heads
from tests.published_heads import D, make_config, make_weights
from tests.tiny import save_tiny_llama

DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    directory = tmp_path / "heads"
    save_heads(directory, make_weights(), make_config())
    return directory


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_weights(directory: Path, **values: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors."""
    path = directory / "model.safetensors"
    tensors = load_file(path) | values
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


# Round trips


@settings(max_examples=25, deadline=None)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), hidden_size=st.integers(1, 9))
def test_round_trip(data: st.DataObject, dtype: Any, hidden_size: int) -> None:
    num_layers = data.draw(st.integers(2, 12))
    layers = sorted(data.draw(st.sets(st.integers(0, num_layers - 1), min_size=1)))
    config = make_config(
        exit_layers=layers,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        dtype=dtype,
    )
    weights = {layer: torch.randn(hidden_size, hidden_size) for layer in layers}
    with tempfile.TemporaryDirectory() as directory:
        save_heads(directory, weights, config)
        loaded_config = load_heads_config(directory)
        loaded = load_tensors(directory, loaded_config).weights
    assert loaded_config == config
    assert list(loaded) == layers
    for layer in layers:
        expected = weights[layer].to(getattr(torch, dtype))
        assert loaded[layer].dtype == expected.dtype
        assert torch.equal(loaded[layer], expected)


def test_round_trip_with_memory(tmp_path: Path) -> None:
    weights = make_weights()
    memory = {layer: -weight for layer, weight in weights.items()}
    save_heads(tmp_path, weights, make_config(), memory=memory)
    config = load_heads_config(tmp_path)
    assert config == make_config(memory=True)
    loaded = load_tensors(tmp_path, config).memory
    assert loaded is not None
    assert list(loaded) == [1, 3]
    for layer in (1, 3):
        assert torch.equal(loaded[layer], memory[layer])
        assert torch.equal(
            load_tensors(tmp_path, config).weights[layer], weights[layer]
        )
    names = sorted(load_file(tmp_path / "model.safetensors"))
    assert names == [
        f"exit_heads.{k}.{n}" for k in (1, 3) for n in ("memory", "weight")
    ]
    assert holds_heads(tmp_path)
    (tmp_path / "config.json").unlink()
    assert holds_heads(tmp_path)


def test_heads_without_memory_say_nothing_of_it(heads: Path) -> None:
    """So that earlier versions, which refuse unknown keys, read them."""
    assert "memory" not in json.loads((heads / "config.json").read_text())
    assert load_tensors(heads, load_heads_config(heads)).memory is None


def test_save_refuses_unfit_memory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"memory for layers \[1\].*are \[1, 3\]"):
        save_heads(tmp_path, make_weights(), make_config(), memory={1: torch.eye(D)})
    with pytest.raises(ValueError, match="memory is true, but there is none"):
        save_heads(tmp_path, make_weights(), make_config(memory=True))
    assert not os.listdir(tmp_path)


def test_config_carries_the_version(heads: Path) -> None:
    assert load_heads_config(heads).library_version == __version__


def test_saving_replaces_heads_and_leaves_no_other_file(heads: Path) -> None:
    save_heads(heads, {2: torch.eye(D)}, make_config(exit_layers=[2]))
    assert load_heads_config(heads).exit_layers == [2]
    assert sorted(os.listdir(heads)) == ["config.json", "model.safetensors"]


def test_failed_save_keeps_the_old_heads(
    heads: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_tensors(heads, load_heads_config(heads)).weights

    def no_space(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_heads(heads, {2: torch.eye(D)}, make_config(exit_layers=[2]))
    after = load_tensors(heads, load_heads_config(heads)).weights
    assert before.keys() == after.keys()
    assert all(torch.equal(before[layer], after[layer]) for layer in before)
    assert sorted(os.listdir(heads)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("at", range(4))
def test_interrupted_save_keeps_the_old_heads(
    heads: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    before = {name: (heads / name).read_bytes() for name in os.listdir(heads)}
    rename, calls = os.rename, iter(range(100))

    def interrupted(source: Path, target: Path) -> None:
        if next(calls) == at:
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_heads(heads, {2: torch.eye(D)}, make_config(exit_layers=[2]))
    assert {name: (heads / name).read_bytes() for name in os.listdir(heads)} == before


def test_a_killed_save_is_refused_not_mixed(heads: Path) -> None:
    """What SIGKILL between the renames leaves, and how it is mended."""
    for name in ("config.json", "model.safetensors"):
        (heads / name).rename(heads / f"{name}.old-1-0123456789abcdef")
    with pytest.raises(AdaDecodeError, match=r"writing heads was interrupted; .*old-1"):
        load_heads_config(heads)
    check_output(heads, "OUT", overwrite=False)
    save_heads(heads, {2: torch.eye(D)}, make_config(exit_layers=[2]))
    assert load_heads_config(heads).exit_layers == [2]


def test_temporary_files_of_heads_follow_no_link(
    heads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where somebody guesses the process id."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("config.json", "model.safetensors"):
        (heads / f"{name}.tmp-{os.getpid()}").symlink_to(precious)
    save_heads(heads, {2: torch.eye(D)}, make_config(exit_layers=[2]))
    assert precious.read_text() == "mine"
    assert load_heads_config(heads).exit_layers == [2]


def model_directory(directory: Path) -> None:
    save_tiny_llama(directory)


def only_weights(directory: Path) -> None:
    save_tiny_llama(directory)
    (directory / "config.json").unlink()


def broken_config(directory: Path) -> None:
    directory.mkdir()
    (directory / "config.json").write_text("{")


@pytest.mark.parametrize("make", [model_directory, only_weights, broken_config])
def test_what_is_not_heads_is_never_replaced(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    directory = tmp_path / "d"
    make(directory)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(
        AdaDecodeError, match=r"directory .*: it holds .*; give another"
    ):
        save_heads(directory, {2: torch.eye(D)}, make_config(exit_layers=[2]))
    with pytest.raises(AdaDecodeError, match=r"OUT .*: it holds .*; give another"):
        check_output(directory, "OUT", overwrite=True)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({1: torch.eye(D)}, r"weight for layers \[1\].*exit_layers are \[1, 3\]"),
        ({1: torch.eye(D), 3: torch.eye(D + 1)}, r"exit 3 has shape \(9, 9\)"),
        ({1: torch.eye(D), 3: torch.full((D, D), torch.nan)}, "exit 3 holds NaN"),
    ],
)
def test_save_refuses_unfit_weights(
    tmp_path: Path, weights: dict[int, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        save_heads(tmp_path / "heads", weights, make_config())
    assert not (tmp_path / "heads").exists()


def test_save_refuses_overflow_of_the_stored_dtype(tmp_path: Path) -> None:
    weights = {1: torch.eye(D), 3: torch.eye(D) * 1e6}
    with pytest.raises(ValueError, match="exit 3 holds NaN or infinity"):
        save_heads(tmp_path, weights, make_config(dtype="float16"))


# Refusals


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


# The schema and the module


def test_schema_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_config().hidden_size = 3  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_module_casts_and_needs_no_gradient(dtype: torch.dtype) -> None:
    weight = torch.randn(D, D)
    heads = ExitHeads({3: weight}, dtype)
    assert heads.exit_layers == (3,)
    assert not any(parameter.requires_grad for parameter in heads.parameters())
    hidden = torch.randn(2, D, dtype=dtype)
    torch.testing.assert_close(heads(3, hidden), hidden @ weight.to(dtype).T)


def test_identity_costs_nothing() -> None:
    heads = ExitHeads({1: torch.eye(D), 3: torch.eye(D) + 0.1}, torch.bfloat16)
    hidden = torch.randn(2, D, dtype=torch.bfloat16)
    assert heads.identity_layers == {1}
    assert heads(1, hidden) is hidden
    assert not torch.equal(heads(3, hidden), hidden)
    assert [name for name, _ in heads.named_parameters()] == ["transforms.3.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_adds_its_product(dtype: torch.dtype) -> None:
    weight, matrix = torch.randn(2, D, D)
    weights, memory = {1: weight, 3: torch.eye(D)}, {1: matrix, 3: matrix}
    heads = ExitHeads(weights, dtype, memory=memory)
    assert heads.has_memory
    assert heads.identity_layers == {3}
    x, g = torch.randn(2, 5, D, dtype=dtype)
    for layer in (1, 3):
        expected = x.float() @ weights[layer].T + g.float() @ matrix.T
        found = heads(layer, x, g)
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=0.1)
        torch.testing.assert_close(
            heads(layer, x), heads(layer, x, torch.zeros_like(g))
        )
        assert found.dtype == dtype
    assert not torch.equal(heads(1, x, g), heads(1, x))


def test_heads_without_memory_do_not_look_at_it() -> None:
    heads = ExitHeads({1: torch.eye(D), 3: torch.randn(D, D)}, torch.float32)
    x, g = torch.randn(2, 5, D)
    assert not heads.has_memory
    assert heads(1, x, g) is x
    assert torch.equal(heads(3, x, g), heads(3, x))


def test_memory_of_other_exits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"exits \[1\], but memory of \[3\]"):
        ExitHeads({1: torch.eye(D)}, torch.float32, memory={3: torch.eye(D)})


def test_almost_the_identity_is_not_the_identity() -> None:
    weight = torch.eye(D)
    weight[0, 1] = 1e-9  # within allclose's tolerance
    assert ExitHeads({1: weight}, torch.float32).identity_layers == frozenset()
