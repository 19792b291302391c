# SPDX-License-Identifier: Apache-2.0
"""The demo model's first layers: sensible text at a fraction of the compiling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from adadecode_vllm.heads import load_heads_config, load_tensors, save_heads
from tests.harness import HEADS, MODEL


def save_short_model(directory: Path, layers: int, exits: list[int]) -> tuple[str, str]:
    """Save the model without its last layers, and the heads of the first exits.

    Args:
        directory: Where to.
        layers: Layers that stay.
        exits: Exits that stay, as layer counts.

    Returns:
        Directories of model and heads.
    """
    model, heads = directory / "model", directory / "heads"
    shutil.copytree(MODEL, model)
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    settings["num_hidden_layers"] = layers
    (model / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    path = model / "model.safetensors"
    weights = {
        name: weight
        for name, weight in load_file(path).items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers
    }
    save_file(weights, path, metadata={"format": "pt"})
    config = load_heads_config(HEADS)
    trained = load_tensors(HEADS, config)
    short = config.model_copy(
        update={
            "exit_layers": exits,
            "num_hidden_layers": layers,
            "calibration": {str(n): (config.calibration or {})[str(n)] for n in exits},
        }
    )
    save_heads(
        heads,
        {layer: trained.weights[layer] for layer in exits},
        short,
        trained.draft_token_ids,
    )
    return str(model), str(heads)
