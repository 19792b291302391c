# SPDX-License-Identifier: Apache-2.0
r"""Decoding speed of several ways of decoding, side by side in one run.

Plain vLLM at its defaults, AdaDecode and others (--variants) stay loaded together and
take turns, so ratios hold on a machine whose speed drifts. Engine arguments are those
of vLLM and hold for all variants:

    python benchmarks/benchmark_throughput.py --model MODEL --adadecode-heads HEADS \
        --dataset-name problems --num-prompts 8 --batch-sizes 1,8 --output-json out.json

Prints a Markdown table; --output-json keeps everything, --plots DIR draws it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from adadecode_vllm.errors import AdaDecodeError
from benchmarks.options import (
    add_variants_option,
    batch_sizes_from,
    make_parser,
    print_results,
    run_command,
    say,
    settings_from,
    workload_from,
)
from benchmarks.quality import make_grade
from benchmarks.session import Session
from benchmarks.tables import results_table
from benchmarks.variants import Case, Variant, parse_variants

DEFAULT_VARIANTS = "baseline,adadecode,single-exit,t-identity,ngram"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = make_parser(__doc__ or "")
    add_variants_option(parser, DEFAULT_VARIANTS)
    parser.add_argument("--plots", type=Path, help="Directory for PNG files")
    parser.add_argument(
        "--engine-logs", type=Path, help="Directory that keeps each engine's log"
    )
    parser.add_argument(
        "--quality",
        action="store_true",
        help="Judge the answers of every variant: GSM8K's exact match, HumanEval's "
        "pass@1",
    )
    parser.add_argument(
        "--oscillate-to",
        type=int,
        help="Let the load swing between the batch size and this many requests at a "
        "time, two rounds of requests each",
    )
    parser.add_argument(
        "--split-prompts",
        action="store_true",
        help="Every repeat takes its own part of the prompts: more texts in the same "
        "time, and a spread over texts",
    )
    args = parser.parse_args(arguments)
    if args.split_prompts and args.rounds is not None:
        raise AdaDecodeError(
            "--split-prompts: --rounds chooses a run's prompts as well. Drop one."
        )
    variants = parse_variants(args.variants)
    check_oscillation(args.oscillate_to, variants)
    settings = settings_from(args)
    batch_sizes = batch_sizes_from(args)
    workload = workload_from(args, settings, max(batch_sizes))
    if args.split_prompts and len(workload.prompts) < args.repeats:
        raise AdaDecodeError(
            f"--split-prompts: {len(workload.prompts)} prompts do not suffice for "
            f"{args.repeats} repeats. Raise --num-prompts or lower --repeats."
        )
    grade = (
        make_grade(workload, settings.model, args.dataset_path)
        if args.quality
        else None
    )
    with Session(
        variants,
        settings,
        workload,
        batch_sizes=batch_sizes,
        ignore_eos=args.ignore_eos,
        rounds=args.rounds,
        oscillate_to=args.oscillate_to,
        split_prompts=args.split_prompts,
        start_together=args.start_together,
        output=args.output_json,
        logs=args.engine_logs,
        grade=grade,
        say=say,
    ) as session:
        cases = [
            Case(variant.name, size) for size in batch_sizes for variant in variants
        ]
        session.measure(cases, args.repeats, args.side_by_side)
    if args.plots is not None:
        from benchmarks.plots import draw_comparison

        for path in draw_comparison([session.results], args.plots):
            say(f"wrote {path}")
    print_results(session.results, results_table([session.results]))


def check_oscillation(low: int | None, variants: Sequence[Variant]) -> None:
    """Refuse what no load can swing to, and who cannot follow.

    Args:
        low: ``--oscillate-to``.
        variants: Of the comparison.

    Raises:
        AdaDecodeError: It is no positive number, or a variant runs batch after batch.
    """
    if low is None:
        return
    if low < 1:
        raise AdaDecodeError(
            f"--oscillate-to: {low} is below 1. Give requests at a time."
        )
    for variant in variants:
        if variant.kind.startswith("transformers"):
            raise AdaDecodeError(
                f"--oscillate-to: {variant.name} answers batch after batch. Leave it "
                "out of --variants."
            )


if __name__ == "__main__":
    run_command(main)
