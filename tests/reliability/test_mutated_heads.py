# SPDX-License-Identifier: Apache-2.0
"""500 damaged heads directories: each is refused with a sentence or loads sound heads.

Damage as disks, downloads and people make it. What start-up does with a directory is
done to each: read the configuration, compare it with the model, read the weights.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adadecode_vllm.engine.exit_heads import ExitHeads
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import (
    load_heads_config,
    load_tensors,
    read_lm_head,
    resolve_heads,
    same_lm_head,
)
from tests.harness import HEADS, MODEL

DIRECTORIES = 500
CONFIG, WEIGHTS = "config.json", "model.safetensors"
Damage = Callable[[Path, random.Random], None]


def _truncate(directory: Path, draw: random.Random) -> None:
    path = directory / draw.choice([CONFIG, WEIGHTS])
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def _append(directory: Path, draw: random.Random) -> None:
    path = directory / draw.choice([CONFIG, WEIGHTS])
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 64)))


def _flip(directory: Path, draw: random.Random) -> None:
    """A few bits, often in the header."""
    path = directory / draw.choice([CONFIG, WEIGHTS])
    content = bytearray(path.read_bytes())
    end = draw.choice([8, 600, len(content)])
    for _ in range(draw.randint(1, 4)):
        content[draw.randrange(min(end, len(content)))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(content))


def _remove(directory: Path, draw: random.Random) -> None:
    (directory / draw.choice([CONFIG, WEIGHTS])).unlink()


def _swap_files(directory: Path, draw: random.Random) -> None:
    config, weights = directory / CONFIG, directory / WEIGHTS
    config.rename(directory / "x")
    weights.rename(config)
    (directory / "x").rename(weights)


def _noise(directory: Path, draw: random.Random) -> None:
    path = directory / draw.choice([CONFIG, WEIGHTS])
    path.write_bytes(draw.randbytes(draw.choice([0, 1, 7, 8, 9, 4096])))


def _huge_header(directory: Path, draw: random.Random) -> None:
    content = (directory / WEIGHTS).read_bytes()
    length = draw.choice([2**63, 2**40, len(content), 100_000_001, 2**64 - 1])
    (directory / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])


def _pickled(directory: Path, draw: random.Random) -> None:
    """It must not be executed, whatever it is named."""
    marker = directory / "executed"

    class Executes:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(marker),)

    name = draw.choice([WEIGHTS, "pytorch_model.bin"])
    if name != WEIGHTS:
        (directory / WEIGHTS).unlink()
    (directory / name).write_bytes(pickle.dumps(Executes()))


def _link_out(directory: Path, draw: random.Random) -> None:
    name = draw.choice([CONFIG, WEIGHTS])
    outside = directory.parent / f"outside-{directory.name}"
    (directory / name).rename(outside)
    (directory / name).symlink_to(outside)


def _tensors(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / WEIGHTS)


def _bad_value(directory: Path, draw: random.Random) -> None:
    value = draw.choice([float("nan"), float("inf"), float("-inf")])

    def change(tensors: dict[str, Any]) -> None:
        name = draw.choice([name for name in tensors if name.startswith("exit_heads")])
        tensors[name].view(-1)[draw.randrange(tensors[name].numel())] = value

    _tensors(directory, change)


def _bad_tensor(directory: Path, draw: random.Random) -> None:
    def change(tensors: dict[str, Any]) -> None:
        name = draw.choice(sorted(tensors))
        tensor = tensors[name]
        kind = draw.randrange(5)
        if kind == 0:
            del tensors[name]
        elif kind == 1:
            tensors[name] = tensor.to(draw.choice([torch.float64, torch.int8]))
        elif kind == 2:
            tensors[name] = tensor[:-1].clone()
        elif kind == 3:
            tensors[name + "x"] = tensors.pop(name)
        else:
            tensors["other"] = torch.zeros(3)

    _tensors(directory, change)


def _bad_tokens(directory: Path, draw: random.Random) -> None:
    def change(tensors: dict[str, Any]) -> None:
        name = next(name for name in tensors if not name.startswith("exit_heads"))
        value = draw.choice([-1, 1 << 40, int(tensors[name][0])])
        tensors[name][draw.randrange(1, len(tensors[name]))] = value

    _tensors(directory, change)


def _bad_key(directory: Path, draw: random.Random) -> None:
    path = directory / CONFIG
    config = json.loads(path.read_text())
    name = draw.choice(sorted(config))
    values = [None, -1, 0, 3, "x", [], {}, 1e9, [4, 2], [2, 2], [0], [16], [[2]], True]
    if draw.random() < 0.2:
        del config[name]
    else:
        config[name] = draw.choice(values)
    path.write_text(json.dumps(config))


def _odd_json(directory: Path, draw: random.Random) -> None:
    texts = ["", "null", "[]", "1", '"x"', "{", "{}", "\x00", "[" * 5000, "\ufeff{}"]
    (directory / CONFIG).write_text(draw.choice(texts), encoding="utf-8")


DAMAGES: list[Damage] = [
    _truncate,
    _append,
    _flip,
    _flip,
    _remove,
    _swap_files,
    _noise,
    _huge_header,
    _pickled,
    _link_out,
    _bad_value,
    _bad_tensor,
    _bad_tokens,
    _bad_key,
    _bad_key,
    _odd_json,
]


def _start_up(directory: Path) -> str:
    """What an engine's start-up reads; returns what became of it."""
    lm_head = read_lm_head(Path(MODEL))
    assert lm_head is not None
    try:
        config = load_heads_config(resolve_heads(str(directory)))
        if not same_lm_head(config.lm_head_fingerprint, lm_head.fingerprint):
            return "other model"
        tensors = load_tensors(directory, config)
        heads = ExitHeads(tensors.weights, torch.float32)
    except AdaDecodeError as error:
        message = str(error)
        assert str(directory) in message, message
        assert "; " in message or message.endswith("."), message  # the remedy
        assert len(message) < 1500, message
        return "refused"
    assert heads.exit_layers == tuple(config.exit_layers)
    states = torch.ones(1, config.hidden_size)
    for layer in heads.exit_layers:
        assert torch.isfinite(heads(layer, states)).all()
    tokens = tensors.draft_token_ids
    if tokens is not None:
        assert len(tokens.unique()) == len(tokens) == config.draft_vocabulary
        assert 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size
    return "sound"


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_damaged_directories_are_refused_or_sound(tmp_path: Path) -> None:
    outcomes: Counter[tuple[str, str]] = Counter()
    for number in range(DIRECTORIES):
        draw = random.Random(number)
        directory = tmp_path / str(number)
        shutil.copytree(HEADS, directory)
        damage = DAMAGES[number % len(DAMAGES)]
        damage(directory, draw)
        outcomes[damage.__name__, _start_up(directory)] += 1
        assert not (directory / "executed").exists(), "a pickle was executed"
        shutil.rmtree(directory)
    # Damage that cannot be overlooked never is.
    always = {
        "_remove",
        "_swap_files",
        "_huge_header",
        "_pickled",
        "_link_out",
        "_bad_value",
        "_bad_tokens",
        "_odd_json",
    }
    overlooked = {
        name for name, outcome in outcomes if outcome == "sound" and name in always
    }
    assert overlooked == set(), outcomes
    assert any(outcome == "sound" for _, outcome in outcomes), "some bits do not matter"
