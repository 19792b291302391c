# SPDX-License-Identifier: Apache-2.0
"""Untrained exit heads, T = I: the start of training, and usable as they are."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch

from adadecode_vllm.errors import AdaDecodeError, first_line
from adadecode_vllm.heads.config import (
    ExitHeadsConfig,
    HeadsDtype,
    exit_layers_problem,
)
from adadecode_vllm.heads.fingerprint import read_lm_head
from adadecode_vllm.heads.hub import download_model
from adadecode_vllm.heads.io import save_heads
from adadecode_vllm.heads.output import check_output
from adadecode_vllm.remote_code import only_trusted_code

# Not `*.safetensors`: some repositories hold the weights twice, in another layout.
_CHECKPOINT_FILES = ["*.json", "model*.safetensors"]


def init_heads(
    model: str,
    directory: str | PathLike[str],
    exit_layers: Sequence[int],
    dtype: HeadsDtype = "float32",
    *,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> ExitHeadsConfig:
    """Write a heads directory with T = I for every exit.

    Args:
        model: The base model: a local directory or the name of a Hugging Face
            repository, in either case with safetensors.
        directory: The heads directory to write.
        exit_layers: Layer counts of the exits, strictly increasing, each in
            [0, L - 1] for a model of L decoder layers.
        dtype: Dtype of the stored weights.
        overwrite: Replace heads that are already in `directory`.
        trust_remote_code: Whether program code that comes with the model may run.

    Returns:
        The configuration that was written.

    Raises:
        AdaDecodeError: The model cannot be read or is no language model, the exit
            layers do not fit it, or the directory holds heads, or files of something
            else, already.
    """
    directory = Path(directory)
    check_output(directory, "DIR", overwrite=overwrite)
    model_dir = _checkpoint(model, with_code=trust_remote_code)
    hidden_size, vocab_size, num_hidden_layers = _dimensions(
        model, model_dir, trust_remote_code
    )
    layers = list(exit_layers)
    if problem := exit_layers_problem(layers, num_hidden_layers):
        raise AdaDecodeError(
            f"--exit-layers {problem}; give increasing layer counts such as "
            f"{_suggestion(num_hidden_layers)}"
        )
    lm_head = read_lm_head(model_dir)
    if lm_head is None:
        raise AdaDecodeError(
            f"MODEL {model}: its LM head cannot be read from safetensors; give the "
            "unquantized checkpoint in safetensors format"
        )
    if (lm_head.vocab_size, lm_head.hidden_size) != (vocab_size, hidden_size):
        raise AdaDecodeError(
            f"MODEL {model}: its LM head has shape "
            f"({lm_head.vocab_size}, {lm_head.hidden_size}), but its configuration "
            f"says ({vocab_size}, {hidden_size}); correct the checkpoint"
        )
    config = ExitHeadsConfig(
        exit_layers=layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        num_hidden_layers=num_hidden_layers,
        base_model=model,
        lm_head_fingerprint=lm_head.fingerprint,
        dtype=dtype,
    )
    save_heads(directory, {layer: torch.eye(hidden_size) for layer in layers}, config)
    return config


def _checkpoint(model: str, *, with_code: bool) -> Path:
    """Return the model's local directory, downloading the checkpoint if needed."""
    if Path(model).is_dir():
        return Path(model)
    code = ["*.py"] if with_code else []
    return download_model(model, [*_CHECKPOINT_FILES, *code])


def _dimensions(
    model: str, model_dir: Path, trust_remote_code: bool
) -> tuple[int, int, int]:
    """Return (hidden_size, vocab_size, num_hidden_layers) of the language model."""
    from transformers import AutoConfig

    try:
        with only_trusted_code(f"MODEL {model}"):
            config = AutoConfig.from_pretrained(
                model_dir, trust_remote_code=trust_remote_code
            ).get_text_config()
        return config.hidden_size, config.vocab_size, config.num_hidden_layers
    except AdaDecodeError:
        raise
    # Not narrower: what a configuration's own checks raise derives from nothing else.
    except Exception as error:
        raise AdaDecodeError(
            f"MODEL {model}: its configuration is not that of a language model "
            f"({first_line(error)}); give a Llama-like model in the Hugging Face layout"
        ) from error


def _suggestion(num_hidden_layers: int) -> str:
    """Exits at the quarters of a model, as `--exit-layers` takes them."""
    quarters = {max(1, num_hidden_layers * i // 4) for i in (1, 2, 3)}
    return ",".join(
        str(layer) for layer in sorted(quarters) if layer < num_hidden_layers
    )
