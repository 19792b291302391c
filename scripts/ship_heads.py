# SPDX-License-Identifier: Apache-2.0
"""Put heads into the package, for a model on the Hub.

    python scripts/ship_heads.py HEADS MODEL [NAME]

Of HEADS, only the exits that its ``recommended`` options use are kept, so that the
package stays small; their weights are copied bit for bit. MODEL is the model's name on
the Hub, whether the heads were trained on a copy of it elsewhere or not. NAME is the
directory beside the registry, by default the last part of MODEL in small letters.

Registered heads are used by ``vllm serve MODEL --plugin adadecode`` without being asked
for: ship only what was measured, and keep it to a few MB.
"""

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import yaml

from adadecode_vllm.files import atomic_write
from adadecode_vllm.heads import Heads
from adadecode_vllm.heads.registry import SHIPPED
from adadecode_vllm.toolkit.publishing.card import render_card, replace_card
from adadecode_vllm.toolkit.publishing.save import save_pretrained


def main() -> None:
    """Write the heads and their entry."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("heads", type=Path)
    parser.add_argument("model")
    parser.add_argument("name", nargs="?")
    arguments = parser.parse_args()
    name = arguments.name or arguments.model.rpartition("/")[2].lower()
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        parser.error(f"NAME {name!r}: give small letters, digits, dots and dashes")
    ship(arguments.heads, arguments.model, SHIPPED, name)


def ship(source: Path, model: str, registry: Path, name: str) -> None:
    """Write the heads that a registry names for a model, then its entry.

    Args:
        source: Heads with ``recommended`` options, perhaps with ``training.yaml``.
        model: The model's name on the Hub.
        registry: The registry's file; created if it is missing.
        name: Of the directory beside it.
    """
    heads = Heads.find(source)
    config, tensors = heads.config, heads.tensors
    recommended = dict(config.recommended or {})
    layers = list(recommended.pop("exit_layers", config.exit_layers))
    calibration = config.calibration and {
        str(layer): config.calibration[str(layer)] for layer in layers
    }
    kept = config.model_copy(
        update={
            "exit_layers": layers,
            "base_model": model,
            "calibration": calibration,
            "recommended": recommended or None,
            "speculators_config": None,
        }
    )
    block = config.speculators_config or {}
    directory = registry.parent / name
    with tempfile.TemporaryDirectory(dir=registry.parent) as work:
        new = Path(work) / name
        record = training_record(source, layers)
        written = save_pretrained(
            new,
            {layer: tensors.weights[layer] for layer in layers},
            kept,
            draft_token_ids=tensors.draft_token_ids,
            memory=tensors.memory
            and {layer: tensors.memory[layer] for layer in layers},
            architectures=block.get("verifier", {}).get("architectures", ()),
            training=record,
        )
        replace_card(new, render_card(written, None, training=record))
        if directory.exists():
            directory.rename(Path(work) / "replaced")
        new.rename(directory)
    entries = json.loads(registry.read_text())["heads"] if registry.is_file() else []
    entries = [entry for entry in entries if entry.get("directory") != name]
    entries.append({"models": [model], "directory": name})
    atomic_write(registry, (json.dumps({"heads": entries}, indent=2) + "\n").encode())
    print(f"{directory}: exits {layers} for {model}")


def training_record(source: Path, layers: list[int]) -> dict[str, Any] | None:
    """What ``training.yaml`` says, with the figures of some exits only."""
    path = source / "training.yaml"
    if not path.is_file():
        return None
    record: dict[str, Any] = yaml.safe_load(path.read_text())
    held_out = record.get("held_out") or {}
    for figures in held_out.values():
        if isinstance(figures, dict):
            for layer in figures.keys() - {str(layer) for layer in layers}:
                del figures[layer]
    return record


if __name__ == "__main__":
    main()
