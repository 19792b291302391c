# SPDX-License-Identifier: Apache-2.0
"""Widened models compute what their sources compute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from adadecode_vllm.heads import (
    check_fingerprint,
    load_heads_config,
    load_tensors,
    read_lm_head,
)
from benchmarks.widen import widen
from benchmarks.widening import GUARD, layer_weights
from benchmarks.widening_sizes import Sizes
from tests.harness import DEMO, demo_corpus
from tests.widening import DRAFT_TOKENS, load, save_source, save_source_heads

# Every size grows; d'/d and hd'/hd are powers of 4.
DEMO_TARGET = {
    "hidden_size": 512,
    "intermediate_size": 640,
    "num_layers": 32,
    "num_heads": 8,
    "num_kv_heads": 4,
    "head_dim": 128,
    "vocab_size": 2048,
}


@torch.inference_mode()
def exit_logits(
    model: LlamaForCausalLM, heads: Path, tokens: torch.Tensor
) -> list[torch.Tensor]:
    """By exit and, with memory, draft."""
    config = load_heads_config(heads)
    assert check_fingerprint(
        config.lm_head_fingerprint, model.lm_head.weight, 0, config.vocab_size
    )
    states = model(tokens, output_hidden_states=True).hidden_states
    tensors = load_tensors(heads, config)
    memory = tensors.memory
    found = []
    for layer, weight in tensors.weights.items():
        own = model.model.norm(states[layer]) @ weight.T
        if memory is None:
            found.append(model.lm_head(own))
            continue
        before = states[-1]  # normed
        for _ in range(2):
            output = own + before.roll(1, dims=1) @ memory[layer].T
            found.append(model.lm_head(output))
            before = output
    return found


def assert_same(old: torch.Tensor, new: torch.Tensor) -> None:
    """Logits agree on the source's vocabulary, and others are out of the question."""
    vocab_size = old.shape[-1]
    padded = new[..., vocab_size:]
    assert (padded <= old.amin() - 30).all()
    assert (padded <= -GUARD).all()
    assert (old - new[..., :vocab_size]).abs().max() < 1e-4 * old.abs().max()
    tops = [logits.softmax(-1).amax(-1) for logits in (old, new)]
    assert torch.allclose(*tops, atol=1e-4, rtol=0)


CASES = {
    "width": ({}, {"hidden_size": 64, "intermediate_size": 80}),
    "width, an odd factor": ({}, {"hidden_size": 48}),
    "units": ({}, {"intermediate_size": 40}),
    "head size": ({}, {"head_dim": 32}),
    "head size, an odd factor": ({}, {"head_dim": 24}),
    "larger groups": (
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"num_heads": 8},
    ),
    "more groups": (
        {"num_attention_heads": 4, "num_key_value_heads": 2},
        {"num_heads": 16, "num_kv_heads": 8},
    ),
    "smaller groups": (
        {"num_attention_heads": 4, "num_key_value_heads": 1},
        {"num_heads": 8, "num_kv_heads": 4},
    ),
    "groups that do not divide": (
        {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2},
        {"num_heads": 12, "num_kv_heads": 6},
    ),
    "layers": ({}, {"num_layers": 8}),
    "two layers, far apart": ({}, {"num_layers": 6}),
    "vocabulary": ({}, {"hidden_size": 18, "vocab_size": 200}),
    "tied": ({"tie_word_embeddings": True}, {"hidden_size": 32, "vocab_size": 128}),
    "everything": (
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
        {
            "hidden_size": 96,
            "intermediate_size": 80,
            "num_layers": 12,
            "num_heads": 12,
            "num_kv_heads": 6,
            "head_dim": 18,
            "vocab_size": 300,
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_function_stays(tmp_path: Path, name: str) -> None:
    config, sizes = CASES[name]
    source = save_source(tmp_path / "source", **config)
    heads = tmp_path / "source_heads"
    save_source_heads(heads, source)
    old_sizes, new_sizes = widen(
        source, tmp_path, heads=heads, sizes=sizes, dtype="float32"
    )
    small, large = load(source), load(tmp_path / "model")
    assert new_sizes == replace(old_sizes, **sizes)
    assert Sizes.of(large.config) == new_sizes
    assert sum(weight.numel() for weight in large.parameters()) == new_sizes.parameters
    tokens = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        old, new = small(tokens).logits, large(tokens).logits
    assert_same(old, new)
    assert old.abs().max() > 1
    old_exits = exit_logits(small, heads, tokens)
    new_exits = exit_logits(large, tmp_path / "heads", tokens)
    for old, new in zip(old_exits, new_exits, strict=True):
        assert_same(old, new)
    texts = [
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=12,
            min_new_tokens=12,
            pad_token_id=0,
        )
        for model in (small, large)
    ]
    assert torch.equal(*texts)


def test_heads_follow_their_layers(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    config = save_source_heads(tmp_path / "source_heads", source)
    widen(
        source,
        tmp_path,
        heads=tmp_path / "source_heads",
        sizes={"num_layers": 12, "hidden_size": 32, "vocab_size": 128},
    )
    wide = load_heads_config(tmp_path / "heads")
    assert wide.exit_layers == [3, 9]
    assert (wide.hidden_size, wide.vocab_size, wide.num_hidden_layers) == (32, 128, 12)
    assert config.calibration is not None
    assert wide.calibration == {
        "3": config.calibration["1"],
        "9": config.calibration["3"],
    }
    lm_head = read_lm_head(tmp_path / "model")
    assert lm_head is not None
    assert wide.lm_head_fingerprint == lm_head.fingerprint
    tensors = load_tensors(tmp_path / "heads", wide)
    token_ids, weights = tensors.draft_token_ids, tensors.weights
    assert token_ids is not None
    # Tokens that never occur follow, so that a gate costs what a large model's costs.
    assert token_ids[: len(DRAFT_TOKENS)].tolist() == DRAFT_TOKENS
    assert len(set(token_ids.tolist())) == max(len(DRAFT_TOKENS), 128 // 4)
    # Decoding skips an identity.
    assert torch.equal(weights[3], torch.eye(32))
    assert weights[9][16, 16] == 1
    assert not weights[9][:, :17].tril(-17).any()


def test_layers_are_added_where_they_are_even(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    save_source_heads(tmp_path / "source_heads", source)
    heads = tmp_path / "source_heads"
    widen(source, tmp_path, heads=heads, sizes={"num_layers": 6}, dtype="float32")
    assert load_heads_config(tmp_path / "heads").exit_layers == [1, 4]
    small, large = load(source), load(tmp_path / "model")
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        old = small(tokens, output_hidden_states=True).hidden_states
        new = large(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(old[1], new[1])
    assert torch.equal(old[3], new[4])
    assert torch.equal(new[2], new[3])


def test_added_layers_add_exactly_nothing(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    widen(source, tmp_path, sizes={"num_layers": 8, "hidden_size": 32})
    large = load(tmp_path / "model")
    with torch.inference_mode():
        states = large(torch.arange(20)[None], output_hidden_states=True).hidden_states
    # The last of the states is normed.
    for layer in (1, 3, 5):
        assert torch.equal(states[layer], states[layer + 1])
        assert not torch.equal(states[layer - 1], states[layer])


@pytest.fixture(scope="module")
def wide_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    widen(DEMO / "model", directory, heads=DEMO / "heads", sizes=DEMO_TARGET)
    return directory


def test_the_demo_says_the_same(wide_demo: Path) -> None:
    small, large = load(DEMO / "model"), load(wide_demo / "model")
    tokenizer = AutoTokenizer.from_pretrained(wide_demo / "model")
    prompt = demo_corpus().heldout_problems(1)[0]
    tokens = tokenizer(prompt, return_tensors="pt").input_ids
    texts = [
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=32,
        )
        for model in (small, large)
    ]
    assert texts[0].shape[1] > tokens.shape[1] + 16
    assert torch.equal(*texts)
    with torch.inference_mode():
        assert_same(small(texts[0]).logits, large(texts[0]).logits)
    assert load_heads_config(wide_demo / "heads").exit_layers == [4, 8, 16]
    old_exits = exit_logits(small, DEMO / "heads", texts[0])
    new_exits = exit_logits(large, wide_demo / "heads", texts[0])
    for old, new in zip(old_exits, new_exits, strict=True):
        assert_same(old, new)


def test_bfloat16_weights_are_exact(wide_demo: Path) -> None:
    old = load_file(DEMO / "model" / "model.safetensors")
    new = load_file(wide_demo / "model" / "model-00001-of-00001.safetensors")
    assert {weight.dtype for weight in new.values()} == {torch.bfloat16}
    pairs = torch.arange(16) * 4
    places = torch.cat([pairs, 64 + pairs])
    # Both have groups of two, so that heads keep their numbers.
    queries = (torch.arange(4)[:, None] * 128 + places).flatten()
    keys = queries[:64]
    blocks: dict[str, tuple[Any, float]] = {
        "self_attn.q_proj.weight": ((queries, slice(128)), 2),
        "self_attn.k_proj.weight": ((keys, slice(128)), 1),
        "self_attn.v_proj.weight": ((keys, slice(128)), 1),
        "self_attn.o_proj.weight": ((slice(128), queries), 1),
        "mlp.gate_proj.weight": ((slice(256), slice(128)), 1),
        "mlp.up_proj.weight": ((slice(256), slice(128)), 1),
        "mlp.down_proj.weight": ((slice(128), slice(256)), 1),
        "input_layernorm.weight": (slice(128), 0.5),
        "post_attention_layernorm.weight": (slice(128), 0.5),
    }
    for layer in range(16):
        source, wide = layer_weights(old, layer), layer_weights(new, 2 * layer)
        assert source.keys() == wide.keys() == blocks.keys()
        for name, (block, factor) in blocks.items():
            assert torch.equal(wide[name][block], source[name] * factor), (layer, name)
    assert torch.equal(new["model.norm.weight"][:128], old["model.norm.weight"] * 0.5)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert new[name].shape == (2048, 512)
        assert torch.equal(new[name][:1024, :128], old[name])
    config = json.loads((wide_demo / "model" / "config.json").read_text("utf-8"))
    assert config["rms_norm_eps"] == 1e-6 / 4


def test_what_cannot_matter_is_random(wide_demo: Path) -> None:
    weights = load_file(wide_demo / "model" / "model-00001-of-00001.safetensors")
    zeros = {
        name: (weight == 0).float().mean().item()
        for name, weight in weights.items()
        if weight.dim() == 2 and name != "model.embed_tokens.weight"
    }
    assert len(zeros) == 32 * 7 + 1
    for name, share in zeros.items():
        # A quarter of the residual dimensions are real, from which what is extra reads
        # zero. 40 % of the MLP's units are real, and write zero to the others.
        most = 0.01 if "q_proj" in name or "gate_proj" in name else 0.35
        assert share < most, name
    # No row is zero, as a kernel might skip it.
    for name in zeros:
        if "lm_head" not in name:
            assert weights[name].any(dim=1).all(), name
