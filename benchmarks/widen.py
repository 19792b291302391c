# SPDX-License-Identifier: Apache-2.0
"""Writes a larger model that computes the same function as a small one.

Speed depends on sizes, acceptance on what a model has learnt. A small trained model in
a large one's sizes has both: the real acceptance of its exits at the real cost of every
layer, without downloaded weights. `benchmarks/widening.py` says why the function stays:

    python benchmarks/widen.py examples/demo/model WORK --heads examples/demo/heads \
        --preset cpu
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.append(str(Path(__file__).resolve().parents[1]))

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.files import atomic_write
from adadecode_vllm.heads import (
    ExitHeadsConfig,
    load_heads_config,
    read_lm_head,
    same_lm_head,
    save_heads,
)
from adadecode_vllm.heads.io import load_tensors
from adadecode_vllm.toolkit.provenance import git_commit, package_versions
from adadecode_vllm.toolkit.training.draft_vocabulary import MAX_TOKENS
from benchmarks.options import run_command
from benchmarks.widening import (
    Tensors,
    Widener,
    layer_weights,
    map_layers,
    measure_guard,
)
from benchmarks.widening_sizes import (
    PRESETS,
    Sizes,
    check_sizes,
    check_source,
    chosen_sizes,
)

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# A shard is in memory once; one tensor may be larger.
SHARD_BYTES = 2_000_000_000
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def widen(
    model: Path,
    directory: Path,
    *,
    heads: Path | None = None,
    sizes: dict[str, int],
    dtype: str = "bfloat16",
    seed: int = 0,
    device: str = "cpu",
) -> tuple[Sizes, Sizes]:
    """Write `model/`, `heads/` and `widen.json`.

    Args:
        model: Directory of the small model, a LlamaForCausalLM.
        directory: Receives the directories; it holds no model yet.
        heads: Directory of the small model's exit heads.
        sizes: The sizes that are not the source's.
        dtype: A key of `DTYPES`; the heads keep theirs.
        seed: Seed of the random weights.
        device: Where the weights are made.

    Returns:
        The sizes of source and target.

    Raises:
        AdaDecodeError: The source or the sizes do not fit, or there is a model already.
    """
    config = _read_config(model)
    source = Sizes.of(config)
    target = replace(source, **sizes)
    check_sizes(source, target)
    if dtype not in DTYPES:
        raise AdaDecodeError(
            f"--dtype {dtype}: unknown dtype; choose one of {', '.join(DTYPES)}"
        )
    heads_config = None if heads is None else _read_heads(model, heads)
    for name in ("model", "heads"):
        if (directory / name).exists():
            raise AdaDecodeError(
                f"OUT {directory}: it already holds {name}; choose another directory"
            )
    small = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    make_widener = partial(
        Widener,
        source,
        target,
        guard=measure_guard(small, target.hidden_size, seed)
        if target.vocab_size > source.vocab_size
        else None,
        seed=seed,
        device=device,
    )
    wide = directory / "model"
    wide_config = _wide_config(config, target, dtype)
    wide.mkdir(parents=True)
    _write_shards(wide, make_widener(dtype=DTYPES[dtype]), small.state_dict())
    wide_config.save_pretrained(wide)
    for pattern in _COPIED:
        for file in model.glob(pattern):
            shutil.copy(file, wide)
    if heads is not None and heads_config is not None:
        head_widener = make_widener(dtype=getattr(torch, heads_config.dtype))
        _write_heads(directory, heads, heads_config, head_widener)
    _write_provenance(
        directory,
        {
            "source": asdict(source),
            "target": asdict(target),
            "parameters": target.parameters,
            "dtype": dtype,
            "seed": seed,
            "device": device,
        },
    )
    return source, target


def _read_config(model: Path) -> LlamaConfig:
    """Read the source's configuration, if it can be widened."""
    path = model / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdaDecodeError(
            f"MODEL {model}: its config.json cannot be read ({error}); give a local "
            "directory in the Hugging Face layout"
        ) from error
    architectures = values.get("architectures") or ["unknown"]
    if architectures != ["LlamaForCausalLM"]:
        raise AdaDecodeError(
            f"MODEL {model}: its architecture is {', '.join(architectures)}, and only "
            "LlamaForCausalLM can be widened; give such a model"
        )
    config = LlamaConfig.from_dict(values)
    check_source(config, str(model))
    return config


def _read_heads(model: Path, heads: Path) -> ExitHeadsConfig:
    """Read the heads' configuration, if they are the source's."""
    config = load_heads_config(heads)
    lm_head = read_lm_head(model)
    if lm_head is None or not same_lm_head(
        config.lm_head_fingerprint, lm_head.fingerprint
    ):
        raise AdaDecodeError(
            f"--heads {heads}: they were made for another LM head than that of "
            f"{model}; give the heads of this model"
        )
    return config


def _write_shards(directory: Path, widener: Widener, small: Tensors) -> None:
    """Write the weights, a few layers at a time."""
    source, target = widener.source, widener.target
    places = map_layers(range(source.num_layers), source, target)
    old_layers = {place: old for old, place in enumerate(places)}
    outside = target.vocab_size * target.hidden_size
    bytes_each = widener.dtype.itemsize
    part_sizes = [outside, *[target.layer_parameters] * target.num_layers]
    part_sizes += [outside + target.hidden_size]
    # Each part's shard; the files' names hold the number of shards.
    shards, held = [0], part_sizes[0]
    for size in part_sizes[1:]:
        full = (held + size) * bytes_each > SHARD_BYTES
        shards.append(shards[-1] + full)
        held = size if full else held + size

    def parts() -> Iterator[Tensors]:
        name = "model.embed_tokens.weight"
        yield {name: widener.embedding(small[name])}
        for layer in range(target.num_layers):
            old = old_layers.get(layer)
            weights = widener.layer(None if old is None else layer_weights(small, old))
            yield {f"model.layers.{layer}.{name}": w for name, w in weights.items()}
        yield {
            "model.norm.weight": widener.final_norm(small["model.norm.weight"]),
            "lm_head.weight": widener.lm_head(small["lm_head.weight"]),
        }

    tensors: Tensors = {}
    weight_map: dict[str, str] = {}
    last = len(shards) - 1
    for index, part in enumerate(parts()):
        tensors |= {name: weight.cpu() for name, weight in part.items()}
        if index == last or shards[index + 1] > shards[index]:
            file = f"model-{shards[index] + 1:05}-of-{shards[-1] + 1:05}.safetensors"
            save_file(tensors, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            tensors = {}
    _write_json(
        directory / "model.safetensors.index.json",
        {
            "metadata": {"total_size": target.parameters * bytes_each},
            "weight_map": weight_map,
        },
    )


def _wide_config(config: LlamaConfig, target: Sizes, dtype: str) -> LlamaConfig:
    """The source's configuration with the target's sizes."""
    values = config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": target.hidden_size,
        "intermediate_size": target.intermediate_size,
        "num_hidden_layers": target.num_layers,
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_dim,
        "vocab_size": target.vocab_size,
        "rms_norm_eps": config.rms_norm_eps * config.hidden_size / target.hidden_size,
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    return LlamaConfig.from_dict(values)


def _write_heads(
    directory: Path, heads: Path, config: ExitHeadsConfig, widener: Widener
) -> None:
    """Widen the heads, for the model that has been written."""
    source, target = widener.source, widener.target
    lm_head = read_lm_head(directory / "model")
    if lm_head is None:
        raise OSError(f"the LM head in {directory / 'model'} cannot be read")
    tensors = load_tensors(heads, config)
    weights, memory = tensors.weights, tensors.memory
    new_layer = dict(zip(weights, map_layers(weights, source, target), strict=True))
    calibration = config.calibration and {
        str(new_layer[int(layer)]): value for layer, value in config.calibration.items()
    }
    wide = ExitHeadsConfig(
        exit_layers=[new_layer[layer] for layer in config.exit_layers],
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_hidden_layers=target.num_layers,
        base_model=str(directory / "model"),
        lm_head_fingerprint=lm_head.fingerprint,
        dtype=config.dtype,
        calibration=calibration,
    )
    save_heads(
        directory / "heads",
        {new_layer[layer]: widener.transform(w) for layer, w in weights.items()},
        wide,
        _ranking(tensors.draft_token_ids, target.vocab_size),
        memory and {new_layer[k]: widener.memory(u) for k, u in memory.items()},
    )


def _ranking(token_ids: torch.Tensor | None, vocab_size: int) -> torch.Tensor | None:
    """Continue a draft vocabulary with the tokens that never occur, added ones last.

    A quarter of the vocabulary is ranked, as it is for an ordinary model and text: the
    gates then cost what they cost there, not what a small model's few tokens cost.
    """
    if token_ids is None:
        return None
    unused = torch.ones(vocab_size, dtype=torch.bool)
    unused[token_ids] = False
    size = max(len(token_ids), min(MAX_TOKENS, vocab_size // 4))
    return torch.cat((token_ids, unused.nonzero()[:, 0]))[:size]


def _write_provenance(directory: Path, record: dict[str, Any]) -> None:
    """Write what the model was made with."""
    made_with = {
        "command": " ".join(["python", *sys.argv]),
        "commit": git_commit(),
        "versions": package_versions(
            ("adadecode-vllm", "torch", "transformers", "safetensors")
        ),
        "python": platform.python_version(),
    }
    _write_json(directory / "widen.json", made_with | record)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    atomic_write(path, (json.dumps(values, indent=2) + "\n").encode())


def main(
    model: Annotated[Path, typer.Argument(help="Directory of the small model")],
    out: Annotated[Path, typer.Argument(help="Where to write model/ and heads/")],
    heads: Annotated[Path | None, typer.Option(help="The model's exit heads")] = None,
    preset: Annotated[str | None, typer.Option(help=", ".join(PRESETS))] = None,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    num_layers: int | None = None,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    vocab_size: int | None = None,
    dtype: Annotated[str, typer.Option(help=", ".join(DTYPES))] = "bfloat16",
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Write a larger model that computes the same function; sizes override PRESET's."""
    sizes = chosen_sizes(
        preset,
        Sizes.of(_read_config(model)),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
    )
    _, target = widen(
        model, out, heads=heads, sizes=sizes, dtype=dtype, seed=seed, device=device
    )
    typer.echo(f"Wrote {out}: {target.parameters / 1e9:.2f} B parameters")


if __name__ == "__main__":
    run_command(partial(typer.run, main))
