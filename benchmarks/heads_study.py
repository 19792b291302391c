# SPDX-License-Identifier: Apache-2.0
"""Exit heads compared: trained or not, small or full-size, of one domain or of two.

The paper's ablations and both gates, on held-out text of two domains. Speedups are
predicted, not measured: decoding is simulated on the model's own answers and rated by
the formula of docs/design.md. The data are those of `examples/demo/make_heads.sh WORK`:

    python benchmarks/heads_study.py --problems WORK/data/problems \
        --code WORK/data/code --heldout-problems WORK/data/heldout_problems \
        --heldout-code WORK/data/heldout_code
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[1]))

from adadecode_vllm.files import write_whole
from adadecode_vllm.heads.config import ExitHeadsConfig
from adadecode_vllm.toolkit.evaluation.cost import CostModel
from adadecode_vllm.toolkit.evaluation.measure import (
    equal_acceptance,
    measure,
    summarize,
)
from adadecode_vllm.toolkit.evaluation.run import (
    gate_log_odds,
    known_answers,
    load_heads_for,
)
from adadecode_vllm.toolkit.evaluation.simulate import Answer, total
from adadecode_vllm.toolkit.options import parse_layers
from adadecode_vllm.toolkit.states.cache import LiveStates, StateSource, cached_states
from adadecode_vllm.toolkit.states.teacher import Teacher
from adadecode_vllm.toolkit.states.texts import Text, load_texts, model_fingerprint
from adadecode_vllm.toolkit.training.run import (
    FULL_HEADS_FILE,
    RUN_DIRECTORY,
    Reporter,
    RunOptions,
    train_heads,
)
from adadecode_vllm.toolkit.training.settings import TrainSettings
from benchmarks.result_files import hardware

THRESHOLD, CAP = 0.75, 5
GATES = ("probability", "acceptance")
# From 0, where both gates take every token, so that the grid's edge favours neither.
GATE_THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(20))
PRECISIONS = (0.9, 0.95, 0.98)
# A rate that suits T may not suit full-size heads; the better of these is taken, so
# that T is not compared with heads that were trained badly.
FULL_RATES = (5e-3, 1e-3)


@dataclass(frozen=True)
class Domain:
    """Held-out text of one kind: answers of the model itself, and their states."""

    texts: list[Text]
    states: StateSource


@dataclass(frozen=True)
class Heads:
    """Heads to compare: by exit T of shape (d, d), or a full-size head of (V, d).

    ``record`` is the training's ``run.yaml``; ``config`` that of trained T.
    """

    name: str
    trained_on: str
    weights: dict[int, torch.Tensor]
    record: dict[str, Any] = field(default_factory=dict)
    config: ExitHeadsConfig | None = None


@dataclass
class Study:
    """Trains heads on cached states and measures them on held-out text."""

    teacher: Teacher
    exits: list[int]
    settings: TrainSettings
    data: Mapping[str, Path]
    work: Path
    answers: int
    trained: int = 0

    def held_out(self, name: str, directory: Path) -> Domain:
        """Load held-out text and compute its states."""
        texts = load_texts([directory], self.teacher, None)
        layers = [*self.exits, self.teacher.num_layers]
        live = LiveStates(self.teacher, texts, layers, self.settings.pass_tokens)
        key = model_fingerprint(self.teacher)
        at = self.work / "states" / f"held-out-{name}"
        return Domain(texts, cached_states(at, self.teacher, key, live))

    def train(self, name: str, domains: Sequence[str], **options: Any) -> Heads:
        """Train heads on some domains; runs on the same domains share the states."""
        trained_on = " + ".join(domains)
        typer.echo(f"training {name} on {trained_on}", err=True)
        self.trained += 1
        output = self.work / f"heads-{self.trained}"
        record = train_heads(
            self.teacher,
            [self.data[domain] for domain in domains],
            self.exits,
            self.settings.model_copy(update=options),
            RunOptions(
                output,
                cache_directory=self.work / "states" / "-".join(domains),
                overwrite=True,
            ),
            Accelerator(cpu=True),
            Reporter(),
        )
        if "head" not in options:
            config, weights = load_heads_for(self.teacher, output)
            return Heads(name, trained_on, weights, record, config)
        tensors = load_file(output / RUN_DIRECTORY / FULL_HEADS_FILE)
        weights = {layer: tensors[f"exit_heads.{layer}.weight"] for layer in self.exits}
        return Heads(name, trained_on, weights, record)

    def play(self, heads: Heads, domain: Domain, exits: Sequence[int]) -> list[Answer]:
        """Prepare the simulation of some of the exits."""
        texts = domain.texts[: self.answers]
        return known_answers(self.teacher, exits, heads.weights, texts)

    def decode(
        self,
        heads: Heads,
        answers: Sequence[Answer],
        exits: Sequence[int],
        log_odds: Sequence[float],
    ) -> dict[str, float]:
        """Simulate decoding and rate it."""
        counters = total(answers, exits, self.teacher.num_layers, log_odds, CAP)
        # A full-size head costs what the LM head costs, as T = I does: no product more.
        cost = CostModel.of_model(self.teacher.model, identity=heads.config is None)
        return {
            "speedup": cost.speedup(counters),
            "tokens_per_forward": counters.tokens_per_forward,
            "acceptance": counters.acceptance,
            "coverage": counters.coverage,
        }

    def rate(
        self, heads: Heads, domains: Mapping[str, Domain], only: int | None = None
    ) -> dict[str, Any]:
        """A row: agreement, KL (nats) and predicted speedup; `only`: with one exit."""
        exits = self.exits if only is None else [only]
        log_odds = [math.log(THRESHOLD / (1 - THRESHOLD))] * len(exits)
        kept = ("epochs_run", "best_epoch", "tokens", "settings", "held_out", "seconds")
        row: dict[str, Any] = {
            "heads": heads.name,
            "trained_on": heads.trained_on,
            "exits": exits,
            "training": {name: heads.record.get(name) for name in kept},
        }
        for name, domain in domains.items():
            found = measure(heads.weights, domain.states, self.teacher.lm_head)
            row[name] = {
                "agreement": {k: float(found[k].agreed.mean()) for k in exits},
                "kl": {k: float(found[k].kl.mean()) for k in exits},
                **self.decode(heads, self.play(heads, domain, exits), exits, log_odds),
            }
        return row

    def compare_gates(self, heads: Heads, domain: Domain) -> dict[str, Any]:
        """Both gates of calibrated heads on one domain."""
        config = heads.config
        assert config is not None
        assert config.calibration is not None
        maps = {
            int(layer): (row.slope, row.intercept)
            for layer, row in config.calibration.items()
        }
        found = measure(heads.weights, domain.states, self.teacher.lm_head)
        errors = {k: summarize(found[k], maps[k])["reliability"] for k in self.exits}
        report: dict[str, Any] = {
            "equal_acceptance": equal_acceptance(found, maps, PRECISIONS)
        }
        answers = self.play(heads, domain, self.exits)
        for gate in GATES:
            curve = []
            for threshold in GATE_THRESHOLDS:
                log_odds = gate_log_odds(config, threshold, gate)
                figures = self.decode(heads, answers, self.exits, log_odds)
                curve.append({"threshold": threshold, **figures})
            report[gate] = {
                "ece": {layer: error[gate]["ece"] for layer, error in errors.items()},
                "best": max(curve, key=lambda entry: entry["speedup"]),
                "thresholds": curve,
            }
        return report


def main(
    problems: Annotated[Path, typer.Option(help="Data to train on: problems")],
    code: Annotated[Path, typer.Option(help="Data to train on: code")],
    heldout_problems: Annotated[Path, typer.Option(help="The model's own answers")],
    heldout_code: Annotated[Path, typer.Option(help="The model's own answers")],
    model: str = "examples/demo/model",
    exit_layers: str = "2,4,8",
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    answers: Annotated[int, typer.Option(min=1, help="Most to simulate")] = 100,
    output: Annotated[Path, typer.Option(help="JSON file for results")] = Path(
        "benchmarks/results/heads_demo.json"
    ),
) -> None:
    """Train all variants, measure them and print the tables."""
    exits = parse_layers(exit_layers)
    settings = TrainSettings(epochs=epochs, batch_size=batch_size)
    data = {"problems": problems, "code": code}
    with tempfile.TemporaryDirectory() as work:
        study = Study(Teacher.load(model), exits, settings, data, Path(work), answers)
        domains = {
            "problems": study.held_out("problems", heldout_problems),
            "code": study.held_out("code", heldout_code),
        }
        report = _run(study, domains)
    report["job"] = {
        "model": model,
        "answers": answers,
        "threshold": THRESHOLD,
        "max_early_predictions": CAP,
        "full_size_learning_rates": FULL_RATES,
        "held_out_tokens": {
            name: sum(text.used for text in domain.texts)
            for name, domain in domains.items()
        },
    }
    report["table"] = _table(report)
    write_whole(output, (json.dumps(report, indent=1) + "\n").encode())
    typer.echo(report["table"])


def _run(study: Study, domains: Mapping[str, Domain]) -> dict[str, Any]:
    both = list(domains)
    eye = torch.eye(study.teacher.hidden_size)
    mixed = study.train("T, KL", both)
    full = [
        study.train("full size, KL", both, head="full", learning_rate=rate)
        for rate in FULL_RATES
    ]
    compared = [
        Heads("T = I", "nothing", dict.fromkeys(study.exits, eye)),
        mixed,
        study.train("T, greedy", both, objective="greedy"),
        min(full, key=lambda heads: sum(heads.record["held_out"]["loss"].values())),
        *(study.train("T, KL", [domain]) for domain in both),
    ]
    typer.echo("measuring", err=True)
    rows = [study.rate(heads, domains) for heads in compared]
    rows += [study.rate(mixed, domains, only=layer) for layer in study.exits]
    return {
        "command": " ".join(["python", *map(_shorten, sys.argv)]),
        **{name: mixed.record[name] for name in ("commit", "versions", "python")},
        "hardware": {**hardware(), "threads": torch.get_num_threads()},
        "heads": rows,
        "gates": {k: study.compare_gates(mixed, domains[k]) for k in both},
    }


def _shorten(argument: str) -> str:
    """An absolute path's last two parts; anything else as it is."""
    path = Path(argument)
    return "/".join(path.parts[-2:]) if path.is_absolute() else argument


def _table(report: Mapping[str, Any]) -> str:
    lines = [
        "| heads | exits | trained on | agreement, problems (%) | KL | agreement, code "
        "(%) | KL | training (s) | predicted speedup, problems | code |",
        "|" + "---|" * 10,
    ]
    for row in report["heads"]:
        found = [row["problems"], row["code"]]
        cells = [row["heads"], _join(row["exits"], "d"), row["trained_on"]]
        for figures in found:
            cells.append(_join((100 * x for x in figures["agreement"].values()), ".1f"))
            cells.append(_join(figures["kl"].values(), ".3f"))
        seconds = row["training"]["seconds"]
        cells.append("-" if seconds is None else f"{seconds['training']:.0f}")
        cells += [f"{figures['speedup']:.2f}x" for figures in found]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| held-out text | gate | ECE, by exit | coverage (%) where 90 / 95 / 98 % are "
        "right | best predicted speedup |",
        "|" + "---|" * 5,
    ]
    for name, gates in report["gates"].items():
        for gate in GATES:
            coverage = [row[f"coverage_{gate}"] for row in gates["equal_acceptance"]]
            cells = [
                name,
                gate,
                _join(gates[gate]["ece"].values(), ".3f"),
                _join((math.nan if x is None else 100 * x for x in coverage), ".1f"),
                "{speedup:.2f}x at {threshold:g}".format(**gates[gate]["best"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _join(values: Iterable[float], form: str) -> str:
    return " / ".join(format(value, form) for value in values)


if __name__ == "__main__":
    typer.run(main)
