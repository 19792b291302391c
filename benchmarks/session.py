# SPDX-License-Identifier: Apache-2.0
"""A comparison: variants loaded side by side, cases measured in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from adadecode_vllm.config import OF_THRESHOLDS, AdaDecodeConfig, parse_config
from adadecode_vllm.errors import AdaDecodeError
from benchmarks.analysis import summarize
from benchmarks.parity import BaselineLogits, judge
from benchmarks.process import VariantError, VariantProcess
from benchmarks.quality import Grade
from benchmarks.result_files import empty_results, write_results
from benchmarks.roofline import cost_model, predicted_speedup
from benchmarks.tables import results_table
from benchmarks.variants import (
    BASELINE,
    Case,
    EngineSettings,
    Variant,
    llm_arguments,
    reason_to_skip,
    with_identity_heads,
)
from benchmarks.workloads import Workload

WARM_UP_TOKENS = 16


class Session:
    """Running variants, and what was measured with them so far.

    A context manager; the result file is written after every repeat, so that a killed
    run keeps what is finished.

    Attributes:
        results: Content of the result file.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        settings: EngineSettings,
        workload: Workload,
        *,
        batch_sizes: Sequence[int] = (1,),
        ignore_eos: bool = False,
        rounds: int | None = None,
        oscillate_to: int | None = None,
        split_prompts: bool = False,
        start_together: int = 1,
        output: Path | None = None,
        logs: Path | None = None,
        grade: Grade | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Describe the comparison; engines start with the first measurement.

        Args:
            variants: The variants, the baseline among them.
            settings: What they have in common.
            workload: The prompts.
            batch_sizes: All that will be asked for.
            ignore_eos: Generate all tokens of every prompt.
            rounds: Prompts of a run, as a multiple of the requests at a time; None for
                all prompts, whatever their number at a time.
            oscillate_to: Requests at a time in every other phase of a run.
            split_prompts: Every repeat takes its own part of the prompts, not all.
            start_together: Engines to start at a time.
            output: Result file.
            logs: Directory for the engines' logs; None to keep none.
            grade: Judges the answers of every run; None to leave that.
            say: Called with lines about the progress.

        Raises:
            AdaDecodeError: If the baseline is not among the variants.
        """
        if BASELINE not in (variant.name for variant in variants):
            raise AdaDecodeError(
                f"--variants: {BASELINE!r} is missing, and ratios are taken to it. Add "
                "it."
            )
        self.variants = list(variants)
        self.settings = settings
        self.workload = workload
        self.batch_sizes = list(batch_sizes)
        self.ignore_eos = ignore_eos
        self.rounds = rounds
        self.oscillate_to = oscillate_to
        self.split_prompts = split_prompts
        self.start_together = start_together
        self._output = output
        self._logs = logs
        self._grade = grade
        self._say = say
        self._stack = ExitStack()
        self._processes: dict[str, VariantProcess] = {}
        # By variant, what the last case changed of its engine's own policy.
        self._changed: dict[str, frozenset[str]] = {}
        # By batch size and label: the case, and its runs with the baseline's.
        self._measured: dict[
            tuple[int, str], tuple[Case, list[tuple[dict[str, Any], dict[str, Any]]]]
        ] = {}
        self.results = empty_results(settings, workload, ignore_eos, oscillate_to)

    def __enter__(self) -> Session:
        """Make what the engines need; they start when something is measured."""
        with ExitStack() as stack:
            if any(variant.kind == "t-identity" for variant in self.variants):
                directory = Path(stack.enter_context(TemporaryDirectory()))
                self.settings = with_identity_heads(self.settings, directory / "heads")
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End all engines."""
        self._stack.close()

    def measure(
        self, cases: Sequence[Case], repeats: int, side_by_side: int | None = None
    ) -> None:
        """Measure cases repeat after repeat, the baseline first in every repeat.

        Variants that cannot run are noted with their reason, as are variants that fail
        on the way; the rest goes on.

        Args:
            cases: Without the baseline's, which is always measured.
            repeats: Runs of each case.
            side_by_side: Most variants to load at a time beside the baseline; None for
                all. Memory must hold them.

        Raises:
            VariantError: If the baseline fails.
        """
        wanted = [
            variant
            for variant in self.variants
            if variant.name != BASELINE
            and any(case.variant == variant.name for case in cases)
        ]
        size = side_by_side or max(1, len(wanted))
        groups = [wanted[first : first + size] for first in range(0, len(wanted), size)]
        for group in groups or [[]]:
            with ExitStack() as stack:
                # The baseline starts beside the first group and stays loaded.
                if BASELINE not in self._processes:
                    self._start([Variant(BASELINE, BASELINE), *group], stack)
                else:
                    self._start(group, stack)
                for batch_size in dict.fromkeys(case.batch_size for case in cases):
                    self._measure(
                        batch_size,
                        [
                            case
                            for case in cases
                            if case.batch_size == batch_size
                            and self._variant(case) in group
                            and case.variant in self._processes
                            and not reason_to_skip(
                                self._variant(case), self.settings, [batch_size]
                            )
                        ],
                        repeats,
                    )
                for variant in group:
                    self._processes.pop(variant.name, None)

    def _measure(self, batch_size: int, cases: list[Case], repeats: int) -> None:
        """Measure cases of one batch size with the variants that are loaded."""
        baseline = Case(BASELINE, batch_size)
        logits = BaselineLogits(
            lambda prompts: self._generate(baseline, prompts, top_logits=True),
            alone=batch_size == 1,
        )
        for case in [baseline, *cases]:
            self._warm_up(case)
        for repeat in range(repeats):
            prompts = self._prompts(batch_size, repeat, repeats)
            base = self._run(baseline, prompts)
            self._keep(baseline, base, base)
            self._report(baseline, base, repeat, repeats)
            runs: list[tuple[Case, dict[str, Any]]] = []
            for case in cases:
                if case.variant not in self._processes:
                    continue
                try:
                    runs.append((case, self._run(case, prompts)))
                except VariantError as error:
                    self._drop(case.variant, "failed", str(error))
                    continue
                self._report(*runs[-1], repeat, repeats)
            again = None
            if self.settings.dtype != "float32":
                again = logits.where_texts_part(prompts, base, [run for _, run in runs])
            for case, run in runs:
                run |= judge(base, run, again)
                self._keep(case, run, base)
            self._save()

    def _keep(self, case: Case, run: dict[str, Any], base: dict[str, Any]) -> None:
        """Note a run with the baseline's run of the same repeat."""
        key = (case.batch_size, case.label)
        if key not in self._measured:
            self._measured[key] = (case, [])
        self._measured[key][1].append((run, base))

    def _start(self, variants: Sequence[Variant], stack: ExitStack) -> None:
        able = []
        for variant in variants:
            if reason := reason_to_skip(variant, self.settings, self.batch_sizes):
                self._drop(variant.name, "skipped", reason)
            else:
                able.append(variant)
        with ThreadPoolExecutor(self.start_together) as pool:
            started = list(zip(able, pool.map(self._process, able), strict=True))
        failed = None
        for variant, process in started:
            if isinstance(process, VariantError):
                if variant.name == BASELINE:
                    failed = process
                else:
                    self._drop(variant.name, "failed", str(process))
                continue
            keep = self._stack if variant.name == BASELINE else stack
            self._processes[variant.name] = keep.enter_context(process)
            self.results["variants"][variant.name] = {
                "status": "ran",
                "start_up_seconds": process.start_up_seconds,
            }
        # Not before the others are known, which have to be ended as well.
        if failed is not None:
            raise failed

    def _process(self, variant: Variant) -> VariantProcess | VariantError:
        self._say(f"starting {variant.name}")
        try:
            return VariantProcess(variant, self.settings, self._logs)
        except VariantError as error:
            return error

    def _drop(self, variant: str, status: str, reason: str) -> None:
        self._say(f"{variant} {status}: {reason}")
        self._processes.pop(variant, None)
        self.results["variants"][variant] = {"status": status, "reason": reason}
        self._save()

    def _warm_up(self, case: Case) -> None:
        """Meet every kernel once; each number of rows has its own on CPU."""
        process = self._processes.get(case.variant)
        if process is None:
            return
        try:
            process.generate(
                self.workload.prompts[: case.batch_size],
                batch_size=case.batch_size,
                output_tokens=WARM_UP_TOKENS,
                ignore_eos=True,
            )
        except VariantError as error:
            if case.variant == BASELINE:
                raise
            self._drop(case.variant, "failed", str(error))

    def _run(self, case: Case, prompts: range) -> dict[str, Any]:
        if policy := self._policy(case):
            self._processes[case.variant].configure(**policy)
        self._changed[case.variant] = frozenset(case.policy)
        run = self._generate(case, prompts)
        run |= self._processes[case.variant].memory_mib()
        run["prompts"] = [prompts.start, prompts.stop]
        if self._grade is not None:
            run["right"] = self._grade(run["token_ids"], prompts)
        if run["stats"] is not None and case.batch_size == 1:
            run["predicted_speedup"] = predicted_speedup(run["stats"], self._cost(case))
        return run

    def _generate(
        self, case: Case, prompts: Sequence[int], **options: Any
    ) -> dict[str, Any]:
        return self._processes[case.variant].generate(
            [self.workload.prompts[number] for number in prompts],
            batch_size=case.batch_size,
            output_tokens=self.workload.output_tokens,
            ignore_eos=self.ignore_eos,
            oscillate_to=self.oscillate_to,
            **options,
        )

    def _policy(self, case: Case) -> dict[str, Any]:
        """What to tell the engine: the case's changes, and back to what others changed.

        Nothing else: a threshold that is told, even the engine's own, decides in place
        of costs.
        """
        back = set(self._changed.get(case.variant, ())) - case.policy.keys()
        if not back:
            return case.policy
        if not OF_THRESHOLDS.isdisjoint(back) and OF_THRESHOLDS.isdisjoint(case.policy):
            back.add("policy")
        own = self._config(case)
        return {**{name: getattr(own, name) for name in sorted(back)}, **case.policy}

    def _prompts(self, batch_size: int, repeat: int, repeats: int) -> range:
        """Numbers of a run's prompts."""
        count = len(self.workload.prompts)
        if self.split_prompts:
            return range(count * repeat // repeats, count * (repeat + 1) // repeats)
        if self.rounds is not None:
            count = min(count, self.rounds * batch_size)
        return range(count)

    def _variant(self, case: Case) -> Variant:
        return next(
            variant for variant in self.variants if variant.name == case.variant
        )

    def _config(self, case: Case) -> AdaDecodeConfig:
        """The options that the case's engine was started with."""
        arguments = llm_arguments(self._variant(case), self.settings)
        return parse_config(arguments["additional_config"]["adadecode"])

    def _cost(self, case: Case) -> Any:
        from adadecode_vllm.engine.heads_fit import resolve_draft_vocabulary
        from adadecode_vllm.heads import load_heads_config

        config = self._config(case)
        heads = load_heads_config(config.heads)
        return cost_model(
            self.settings.model,
            identity=self._variant(case).kind == "t-identity",
            draft_vocabulary=resolve_draft_vocabulary(config, heads),
            memory=heads.memory,
        )

    def _report(
        self, case: Case, run: dict[str, Any], repeat: int, repeats: int
    ) -> None:
        tokens = sum(map(len, run["token_ids"]))
        self._say(
            f"[{repeat + 1}/{repeats}] batch {case.batch_size}, {case.label}: "
            f"{tokens / run['seconds']:.2f} tok/s"
        )

    def _entry(self, case: Case, pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        runs = [run for run, _ in pairs]
        return {
            "variant": case.variant,
            "label": case.label,
            "batch_size": case.batch_size,
            "policy": case.policy,
            "figures": {
                **summarize(runs, [base for _, base in pairs]),
                "peak_memory_mib": max(run["peak_memory_mib"] for run in runs),
                "private_memory_mib": max(run["private_memory_mib"] for run in runs),
            },
            "runs": [
                {
                    **{key: value for key, value in run.items() if key != "token_ids"},
                    "tokens": sum(map(len, run["token_ids"])),
                }
                for run in runs
            ],
        }

    def _save(self) -> None:
        # One table by batch size, though variants may have been loaded in groups.
        sizes = list(dict.fromkeys(size for size, _ in self._measured))
        self.results["cases"] = [
            self._entry(case, pairs)
            for size in sizes
            for case, pairs in self._measured.values()
            if case.batch_size == size
        ]
        if self._output is not None:
            self.results["table"] = results_table([self.results])
            write_results(self._output, self.results)
