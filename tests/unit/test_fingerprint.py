# SPDX-License-Identifier: Apache-2.0
"""The LM head's fingerprint: dtypes, shards, checkpoints."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adadecode_vllm.heads import (
    check_fingerprint,
    lm_head_fingerprint,
    read_lm_head,
    same_lm_head,
)
from tests.tiny import HIDDEN_SIZE, VOCAB_SIZE, save_tiny_llama


def head(vocab_size: int = VOCAB_SIZE, hidden_size: int = HIDDEN_SIZE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab_size)
    return torch.randn(vocab_size, hidden_size, generator=generator)


def sampled(vocab_size: int) -> list[int]:
    return [i * (vocab_size - 1) // 15 for i in range(16)]


def test_known_value() -> None:
    # Guards the format: heads that are stored somewhere must stay valid.
    weight = torch.zeros(16, 2)
    weight[:, 0] = 1
    fingerprint = lm_head_fingerprint(weight)
    assert fingerprint.startswith("sim64x16:")
    groups = fingerprint.removeprefix("sim64x16:").split("-")
    # printf 'adadecode LM head' | openssl dgst -shake256 -xoflen 8
    assert set(groups) == {"8f885f08829bb9c9"}
    assert len(groups) == 16


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 1000])
def test_dtypes_agree(vocab_size: int) -> None:
    stored = head(vocab_size).bfloat16()
    assert lm_head_fingerprint(stored) == lm_head_fingerprint(stored.float())
    rounded = head(vocab_size)
    fingerprint = lm_head_fingerprint(rounded.bfloat16())
    assert same_lm_head(lm_head_fingerprint(rounded), fingerprint)


@settings(max_examples=50, deadline=None)
@given(
    vocab_size=st.integers(1, 200),
    ranks=st.integers(1, 8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_shards(
    vocab_size: int, ranks: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    weight = head(vocab_size).to(dtype)
    fingerprint = lm_head_fingerprint(weight)
    # As vLLM shards: padded to a multiple of the ranks.
    rows = -(-vocab_size // ranks)
    padded = torch.zeros(rows * ranks, weight.shape[1], dtype=dtype)
    padded[:vocab_size] = weight

    def matches() -> list[bool]:
        return [
            check_fingerprint(fingerprint, shard, rank * rows, vocab_size)
            for rank, shard in enumerate(padded.split(rows))
        ]

    assert all(matches())
    changed = data.draw(st.sampled_from(sampled(vocab_size)))
    padded[changed] *= -1
    assert matches() == [rank != changed // rows for rank in range(ranks)]


def test_another_model_is_noticed() -> None:
    other = head(VOCAB_SIZE + 1)[:VOCAB_SIZE]
    assert not check_fingerprint(lm_head_fingerprint(head()), other, 0, VOCAB_SIZE)


def test_another_vocabulary_is_noticed() -> None:
    weight = head(200)
    assert not check_fingerprint(lm_head_fingerprint(weight[:150]), weight, 0, 200)


def test_what_vanishes_in_float16_is_not_judged() -> None:
    weight = torch.full((VOCAB_SIZE, HIDDEN_SIZE), 1e-9)
    fingerprint = lm_head_fingerprint(weight)
    assert check_fingerprint(fingerprint, weight.half(), 0, VOCAB_SIZE)
    assert same_lm_head(fingerprint, lm_head_fingerprint(weight.half()))


def _rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "float8":
        return (weight / weight.abs().max()).to(torch.float8_e4m3fn)
    if kind in ("float16", "bfloat16"):
        return weight.to(getattr(torch, kind))
    quantized = gguf.GGMLQuantizationType[kind]
    found = gguf.quants.quantize(weight.numpy(), quantized)
    return torch.from_numpy(gguf.quants.dequantize(found, quantized))


@pytest.mark.parametrize(
    "kind", ["bfloat16", "float16", "float8", "Q8_0", "Q4_1", "Q4_0"]
)
def test_a_quantized_lm_head_is_the_same(kind: str) -> None:
    weight = head(3000, 64)
    rounded = _rounded(weight, kind)
    fingerprint = lm_head_fingerprint(weight)
    assert check_fingerprint(fingerprint, rounded, 0, 3000)
    assert same_lm_head(lm_head_fingerprint(rounded), fingerprint)


@pytest.mark.parametrize("kind", ["bfloat16", "float8", "Q4_0"])
def test_another_quantized_lm_head_is_another(kind: str) -> None:
    weight = head(3000, 64)
    other = torch.randn(3000, 64, generator=torch.Generator().manual_seed(1))
    fingerprint = lm_head_fingerprint(_rounded(other, kind))
    assert not check_fingerprint(fingerprint, weight, 0, 3000)
    assert not same_lm_head(fingerprint, lm_head_fingerprint(weight))


@pytest.mark.parametrize(
    "text", ["", "sim64x16:", "sim64x16:0123456789abcdef", "f32:0"]
)
def test_malformed_fingerprint(text: str) -> None:
    with pytest.raises(ValueError, match="malformed LM head fingerprint"):
        check_fingerprint(text, head(), 0, VOCAB_SIZE)


# Checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard_size", ["1GB", "10KB"])
def test_read_lm_head(
    tmp_path: Path, dtype: torch.dtype, tied: bool, shard_size: str
) -> None:
    weight = save_tiny_llama(
        tmp_path, dtype=dtype, max_shard_size=shard_size, tie_word_embeddings=tied
    )
    assert (tmp_path / "model.safetensors.index.json").exists() == (
        shard_size == "10KB"
    )
    lm_head = read_lm_head(tmp_path)
    assert lm_head is not None
    assert (lm_head.vocab_size, lm_head.hidden_size) == tuple(weight.shape)
    assert torch.equal(lm_head.rows, weight[sampled(VOCAB_SIZE)])
    assert lm_head.fingerprint == lm_head_fingerprint(weight)


def test_a_tied_checkpoint_may_hold_a_stale_lm_head(tmp_path: Path) -> None:
    embedding = save_tiny_llama(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "model.safetensors"
    stale = {"lm_head.weight": torch.zeros(VOCAB_SIZE, HIDDEN_SIZE)}
    save_file(load_file(path) | stale, path)
    lm_head = read_lm_head(tmp_path)
    assert lm_head is not None
    assert lm_head.fingerprint == lm_head_fingerprint(embedding)


def test_without_lm_head_the_embedding_serves(tmp_path: Path) -> None:
    # Some families tie by default and say nothing in config.json.
    embedding = save_tiny_llama(tmp_path, tie_word_embeddings=True)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    values.pop("tie_word_embeddings", None)
    path.write_text(json.dumps(values))
    lm_head = read_lm_head(tmp_path)
    assert lm_head is not None
    assert lm_head.fingerprint == lm_head_fingerprint(embedding)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("lm_head.qweight", torch.zeros(2, 2, dtype=torch.int32)),
        ("lm_head.weight", torch.zeros(VOCAB_SIZE, HIDDEN_SIZE, dtype=torch.int8)),
        ("lm_head.weight", torch.zeros(VOCAB_SIZE * HIDDEN_SIZE)),
    ],
)
def test_a_quantized_lm_head_is_not_read(
    tmp_path: Path, name: str, tensor: torch.Tensor
) -> None:
    save_tiny_llama(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["lm_head.weight"]
    save_file(tensors | {name: tensor}, path)
    assert read_lm_head(tmp_path) is None


def test_no_checkpoint(tmp_path: Path) -> None:
    assert read_lm_head(tmp_path / "missing") is None
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert read_lm_head(tmp_path) is None


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_broken_checkpoint_is_logged(
    tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_tiny_llama(tmp_path)
    (tmp_path / file).write_bytes(b"{")
    assert read_lm_head(tmp_path) is None
    assert "cannot be read" in caplog.text
