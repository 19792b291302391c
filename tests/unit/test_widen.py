# SPDX-License-Identifier: Apache-2.0
"""Widened models compute what their sources compute."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import (
    ExitHeadsConfig,
    check_fingerprint,
    load_heads_config,
    load_tensors,
    read_lm_head,
    save_heads,
)
from adadecode_vllm.heads.config import ExitCalibration
from benchmarks import widen as widen_module
from benchmarks.options import run_command
from benchmarks.widen import main, widen
from benchmarks.widening import GUARD, Widener, layer_weights
from benchmarks.widening_sizes import PRESETS, Sizes, chosen_sizes
from tests.harness import DEMO, ROOT, demo_corpus
from tests.tiny import save_tiny_llama

DEMO_SIZES = Sizes(128, 256, 16, 4, 2, 32, 1024)
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
DRAFT_TOKENS = [7, 95, 3]


def save_source(directory: Path, **config: Any) -> Path:
    """A random Llama whose weights are large enough to make a difference."""
    save_tiny_llama(directory, **{"initializer_range": 0.4} | config)
    return directory


def load(directory: Path) -> LlamaForCausalLM:
    model, info = LlamaForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def save_source_heads(directory: Path, model: Path) -> ExitHeadsConfig:
    """Calibrated heads at 1 (T = I) and 3, with memory and a draft vocabulary."""
    lm_head = read_lm_head(model)
    assert lm_head is not None
    size = lm_head.hidden_size
    config = ExitHeadsConfig(
        exit_layers=[1, 3],
        hidden_size=size,
        vocab_size=lm_head.vocab_size,
        num_hidden_layers=4,
        base_model=str(model),
        lm_head_fingerprint=lm_head.fingerprint,
        calibration={
            str(layer): ExitCalibration(slope=0.5, intercept=float(layer), tokens=9)
            for layer in (1, 3)
        },
    )
    torch.manual_seed(1)
    weights = {1: torch.eye(size), 3: torch.randn(size, size)}
    memory = {layer: torch.randn(size, size) / 8 for layer in (1, 3)}
    save_heads(directory, weights, config, torch.tensor(DRAFT_TOKENS), memory)
    return config


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


def test_files_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_source(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(widen_module, "SHARD_BYTES", 100_000)
    _, target = widen(
        source, tmp_path, sizes={"hidden_size": 32, "num_layers": 8}, dtype="float32"
    )
    model = tmp_path / "model"
    index = json.loads((model / "model.safetensors.index.json").read_text("utf-8"))
    shards = sorted(model.glob("*.safetensors"))
    assert [file.name for file in shards] == [
        f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    assert len(shards) > 1
    held = {name: file.name for file in shards for name in load_file(file)}
    assert held == index["weight_map"]
    size = sum(weight.nbytes for file in shards for weight in load_file(file).values())
    assert size == index["metadata"]["total_size"] == 4 * target.parameters
    assert all(file.stat().st_size < 110_000 for file in shards)
    assert (model / "tokenizer.json").read_text("utf-8") == "{}"
    assert (model / "generation_config.json").is_file()
    load(model)


def test_the_seed_decides_the_random_weights(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    made = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        widen(source, tmp_path / name, sizes={"hidden_size": 32}, seed=seed)
        files = sorted((tmp_path / name / "model").glob("*.safetensors"))
        made.append([file.read_bytes() for file in files])
    assert made[0] == made[1] != made[2]


def test_presets_have_the_sizes_they_are_named_after() -> None:
    cpu = replace(DEMO_SIZES, **PRESETS["cpu"])
    assert cpu == Sizes(2048, 5632, 16, 16, 4, 128, 32768)
    assert 0.7e9 < cpu.parameters < 1.0e9
    outside = cpu.vocab_size * cpu.hidden_size
    assert outside / (cpu.parameters - outside) == pytest.approx(0.085, abs=0.001)
    draft = replace(DEMO_SIZES, **PRESETS["draft-cpu"])
    assert draft == Sizes(1024, 2816, 16, 8, 2, 128, 32768)
    # As Llama-3.1-8B's model card counts.
    assert replace(DEMO_SIZES, **PRESETS["llama-3.1-8b"]).parameters == 8_030_261_248
    chosen = chosen_sizes("cpu", DEMO_SIZES, vocab_size=4096, head_dim=None)
    assert chosen == PRESETS["cpu"] | {"vocab_size": 4096}
    assert chosen_sizes(None, DEMO_SIZES, hidden_size=256) == {"hidden_size": 256}


def test_a_preset_makes_no_size_smaller() -> None:
    source = replace(DEMO_SIZES, num_layers=30, vocab_size=49152)
    assert chosen_sizes("cpu", source) == PRESETS["cpu"] | {"vocab_size": 49152}
    assert chosen_sizes("llama-3.1-8b", source) == PRESETS["llama-3.1-8b"]


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"hidden_size": 8}, "--hidden-size 8: smaller than the source's 16"),
        ({"vocab_size": 95}, "--vocab-size 95: smaller than the source's 96"),
        ({"head_dim": 12}, "--head-dim 12: not a multiple of the source's 8"),
        ({"num_layers": 3}, "--num-layers 3: smaller than the source's 4"),
        ({"num_heads": 4, "num_kv_heads": 3}, "--num-kv-heads 3: does not divide"),
        ({"num_heads": 8, "num_kv_heads": 1}, "--num-kv-heads 1: too few"),
        ({"vocab_size": 128}, "--vocab-size 128: padded tokens need a spare"),
        ({"hidden_size": 33}, "--hidden-size 33: transformers refuses"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    tmp_path: Path, sizes: dict[str, int], sentence: str
) -> None:
    source = save_source(tmp_path / "source")
    with pytest.raises(AdaDecodeError) as refusal:
        widen(source, tmp_path, sizes=sizes)
    assert sentence in str(refusal.value)
    assert "; give" in str(refusal.value)
    assert not (tmp_path / "model").exists()


def test_groups_that_need_more_heads_are_refused(tmp_path: Path) -> None:
    groups_of_three = {"num_attention_heads": 6, "num_key_value_heads": 2}
    source = save_source(tmp_path / "source", hidden_size=24, **groups_of_three)
    with pytest.raises(AdaDecodeError) as refusal:
        widen(source, tmp_path, sizes={"num_kv_heads": 3})
    assert str(refusal.value) == (
        "--num-kv-heads 3: too few, with groups of 2 heads the source's 2 key-value "
        "heads of 3 need 4; give more, or more heads"
    )


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"attention_bias": True}, "its linear layers have biases"),
        ({"mlp_bias": True}, "its linear layers have biases"),
        (
            {
                "rope_parameters": {
                    "rope_type": "linear",
                    "factor": 2.0,
                    "rope_theta": 10000.0,
                }
            },
            "its rotary embedding is of type 'linear'",
        ),
    ],
)
def test_other_llamas_are_refused(
    tmp_path: Path, config: dict[str, Any], sentence: str
) -> None:
    source = save_source(tmp_path / "source", **config)
    with pytest.raises(AdaDecodeError, match=f"^MODEL .*source: {sentence}.*; give"):
        widen(source, tmp_path, sizes={"hidden_size": 32})


def test_other_architectures_and_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdaDecodeError, match=r"config\.json cannot be read.*; give"):
        widen(tmp_path, tmp_path, sizes={})
    other = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    (tmp_path / "config.json").write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(AdaDecodeError, match="its architecture is GPT2LMHeadModel"):
        widen(tmp_path, tmp_path, sizes={})


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    with pytest.raises(AdaDecodeError, match="--dtype int8: unknown dtype; choose"):
        widen(source, tmp_path, sizes={}, dtype="int8")
    with pytest.raises(AdaDecodeError, match="--preset big: unknown; choose one of"):
        chosen_sizes("big", DEMO_SIZES)
    other = save_source(tmp_path / "other", seed=1)
    heads = tmp_path / "source_heads"
    save_source_heads(heads, other)
    with pytest.raises(AdaDecodeError, match=r"--heads .* another LM head .*; give"):
        widen(source, tmp_path, heads=heads, sizes={})
    widen(source, tmp_path, sizes={})
    with pytest.raises(AdaDecodeError, match=r"OUT .* already holds model; choose"):
        widen(source, tmp_path, sizes={})


def test_a_guard_goes_with_a_larger_vocabulary() -> None:
    target = replace(DEMO_SIZES, hidden_size=256, vocab_size=2048)
    with pytest.raises(ValueError, match="guard"):
        Widener(DEMO_SIZES, target, dtype=torch.float32)


def test_the_command(tmp_path: Path) -> None:
    source = save_source(tmp_path / "source")
    save_source_heads(tmp_path / "source_heads", source)
    sizes = ["--hidden-size", "32", "--vocab-size", "128", "--dtype", "float32"]
    command = [
        str(ROOT / "benchmarks" / "widen.py"),
        str(source),
        str(tmp_path / "out"),
        "--heads",
        str(tmp_path / "source_heads"),
        *sizes,
    ]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Wrote {tmp_path / 'out'}: ")
    record = json.loads((tmp_path / "out" / "widen.json").read_text("utf-8"))
    assert record["command"] == " ".join(["python", *command])
    assert record["source"]["hidden_size"] == 16
    assert record["target"]["hidden_size"] == 32
    assert record["seed"] == 0
    assert record["versions"]["torch"] == torch.__version__
    assert load_heads_config(tmp_path / "out" / "heads").exit_layers == [1, 3]
    assert load(tmp_path / "out" / "model").lm_head.weight.shape == (128, 32)


def test_the_command_refuses_in_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = save_source(tmp_path / "source")
    out = tmp_path / "out"
    arguments = [str(source), str(out), "--hidden-size", "8"]
    monkeypatch.setattr(sys, "argv", ["widen.py", *arguments])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # Typer has its own
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_command(partial(typer.run, main))
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == (
        "error: --hidden-size 8: smaller than the source's 16; give at least 16\n"
    )
    assert not out.exists()
