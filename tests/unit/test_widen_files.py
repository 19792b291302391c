# SPDX-License-Identifier: Apache-2.0
"""Widening: files, sizes and presets, refusals and the command."""

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

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import load_heads_config
from benchmarks import widen as widen_module
from benchmarks.options import run_command
from benchmarks.widen import main, widen
from benchmarks.widening import Widener
from benchmarks.widening_sizes import PRESETS, Sizes, chosen_sizes
from tests.harness import ROOT
from tests.widening import load, save_source, save_source_heads

DEMO_SIZES = Sizes(128, 256, 16, 4, 2, 32, 1024)


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
