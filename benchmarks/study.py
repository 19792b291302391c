# SPDX-License-Identifier: Apache-2.0
r"""Studies of AdaDecode's speed, one command each.

    python benchmarks/study.py STUDY --model MODEL --adadecode-heads HEADS \
        --output-json benchmarks/results/study_STUDY.json --plots docs/images

All ratios are to plain vLLM at its defaults, measured in the same run, in turn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.options import (
    make_parser,
    numbers,
    print_results,
    run_command,
    say,
    settings_from,
    workload_from,
)
from benchmarks.session import Session
from benchmarks.tables import cycle_table, results_table, unverified_table
from benchmarks.variants import BASELINE, Case, EngineSettings, Variant, parse_variants


@dataclass(frozen=True)
class Plan:
    """What a study measures.

    Attributes:
        variants: Engines to load, the baseline among them.
        cases: Rows of its table.
        settings: What the engines have in common.
    """

    variants: list[Variant]
    cases: list[Case]
    settings: EngineSettings


def _batch(settings: EngineSettings, args: argparse.Namespace) -> Plan:
    values = args.values or "1,2,4,8,16,32"
    sizes = numbers("--values", values, int, lambda n: n > 0)
    return Plan(
        parse_variants(f"{BASELINE},adadecode"),
        [Case("adadecode", size) for size in sizes],
        settings,
    )


def _threshold(settings: EngineSettings, args: argparse.Namespace) -> Plan:
    values = args.values or "0.3,0.4,0.5,0.6,0.7,0.75,0.8,0.85,0.9,0.95"
    thresholds = numbers("--values", values, float, lambda t: 0 <= t <= 1)
    return Plan(
        parse_variants(f"{BASELINE},adadecode"),
        [Case("adadecode", 1, {"threshold": threshold}) for threshold in thresholds],
        replace(settings, threshold=thresholds[0]),
    )


def _cap(settings: EngineSettings, args: argparse.Namespace) -> Plan:
    caps = numbers("--values", args.values or "1,2,3,4,5,6,7,8", int, lambda n: n > 0)
    return Plan(
        parse_variants(f"{BASELINE},adadecode"),
        [Case("adadecode", 1, {"max_early_predictions": cap}) for cap in caps],
        replace(settings, max_early_predictions=max(caps)),
    )


def _exits(settings: EngineSettings, args: argparse.Namespace) -> Plan:
    from adadecode_vllm.heads import load_heads_config

    layers = load_heads_config(settings.heads).exit_layers
    subsets = [
        "+".join(map(str, subset))
        for size in range(1, len(layers) + 1)
        for subset in combinations(layers, size)
    ]
    variants = parse_variants(
        ",".join([BASELINE, *(f"exits:{subset}" for subset in subsets)])
    )
    return Plan(variants, [Case(variant.name) for variant in variants[1:]], settings)


def _synthetic(settings: EngineSettings, args: argparse.Namespace) -> Plan:
    values = args.values or "0.5,0.6,0.7,0.8,0.9,0.95,1"
    rates = numbers("--values", values, float, lambda rate: 0 <= rate <= 1)
    # Every token is predicted at the first exit, so the rate alone decides. vLLM's own
    # synthetic rejection sampler has no CPU version, and its text would be another.
    return Plan(
        parse_variants(f"{BASELINE},adadecode"),
        [Case("adadecode", 1, {"synthetic_acceptance_rate": rate}) for rate in rates],
        replace(settings, threshold=0.0),
    )


STUDIES: Mapping[
    str, tuple[str, Callable[[EngineSettings, argparse.Namespace], Plan]]
] = {
    "batch": ("speedup by batch size", _batch),
    "threshold": ("speedup by threshold", _threshold),
    "cap": ("speedup by the most unverified tokens of a request", _cap),
    "exits": ("every choice among the heads' exits", _exits),
    "synthetic": ("speedup by acceptance: predictions corrupted at a rate", _synthetic),
}


def study_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(__doc__ or "")
    parser.add_argument(
        "study",
        choices=STUDIES,
        help="; ".join(f"{name}: {text}" for name, (text, _) in STUDIES.items()),
    )
    parser.add_argument("--values", help="Comma-separated, instead of the study's own")
    parser.add_argument("--plots", type=Path, help="Directory for PNG files")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one study and print its tables."""
    args = study_parser().parse_args(arguments)
    plan = STUDIES[args.study][1](settings_from(args), args)
    batch_sizes = list(dict.fromkeys(case.batch_size for case in plan.cases))
    workload = workload_from(args, plan.settings, max(batch_sizes))
    with Session(
        plan.variants,
        plan.settings,
        workload,
        batch_sizes=batch_sizes,
        ignore_eos=args.ignore_eos,
        output=args.output_json,
        say=say,
    ) as session:
        session.results["study"] = args.study
        session.measure(plan.cases, args.repeats, args.side_by_side)
    if args.plots is not None:
        from benchmarks.plots import draw_comparison

        for path in draw_comparison([session.results], args.plots):
            say(f"wrote {path}")
    results = session.results
    tables = results_table([results]), cycle_table(results), unverified_table(results)
    print_results(results, "\n\n".join(tables))


if __name__ == "__main__":
    run_command(main)
