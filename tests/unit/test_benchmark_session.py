# SPDX-License-Identifier: Apache-2.0
"""In which order variants run, and what is kept when something fails."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import pytest

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import load_heads_config
from benchmarks import session as session_module
from benchmarks.options import print_results
from benchmarks.process import VariantError, VariantProcess, log_reason
from benchmarks.session import Session
from benchmarks.variants import Case, EngineSettings, Variant, parse_variants
from benchmarks.workloads import Workload
from tests.harness import HEADS, MODEL
from tests.throughput_benchmark import SETTINGS, stats

WORKLOAD = Workload("text", [[1, 2], [3]], ["a", "b"], False, 4, "two prompts", "ab")


def test_a_log_is_cut_to_its_last_sentence() -> None:
    log = "a\nRuntimeError: Engine core failed\nb\nValueError: too long\nc\n"
    assert log_reason(log) == "ValueError: too long"
    assert log_reason("x\n" * 40).count("x") == 20


@pytest.mark.parametrize("name", ["baseline", "adadecode"])
def test_engines_run_in_the_users_environment(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """At vLLM's defaults, therefore: a variable that slows one engine slows a ratio."""
    seen: dict[str, str] = {}

    def popen(command: Any, env: dict[str, str], **_: Any) -> Any:
        seen.update(env)
        raise OSError("enough is known")

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(OSError, match="enough"):
        VariantProcess(Variant(name, name), SETTINGS)
    ours = {"VLLM_LOGGING_LEVEL": "ERROR"}
    if name == "baseline":
        ours["VLLM_PLUGINS"] = ""
    assert seen == {**os.environ, **ours}


class FakeProcess:
    """A variant without an engine: `log` says what was asked of all of them."""

    log: ClassVar[list[str]] = []
    prompts: ClassVar[list[int]] = []
    policies: ClassVar[list[dict[str, Any]]] = []
    broken: ClassVar[set[str]] = set()
    breaks_in_repeat: ClassVar[dict[str, int]] = {}

    def __init__(
        self, variant: Variant, settings: EngineSettings, logs: Path | None = None
    ) -> None:
        if variant.name in self.broken:
            raise VariantError("it is broken")
        self.variant = variant
        self.start_up_seconds = 1.0
        self.repeat = 0
        self.policy: dict[str, Any] = {}

    def __enter__(self) -> "FakeProcess":
        return self

    def __exit__(self, *_: Any) -> None:
        self.log.append(f"end {self.variant.name}")

    def configure(self, **policy: Any) -> None:
        self.policy = policy
        self.policies.append(policy)

    def memory_mib(self) -> dict[str, float]:
        return {"peak_memory_mib": 2.0, "private_memory_mib": 1.0}

    def generate(self, prompts: Any, **options: Any) -> dict[str, Any]:
        if options["output_tokens"] != WORKLOAD.output_tokens:
            return {}
        self.prompts.append(len(prompts))
        self.repeat += 1
        if self.repeat == self.breaks_in_repeat.get(self.variant.name):
            raise VariantError("it ended")
        threshold = self.policy.get("threshold")
        logits = options.get("top_logits", False)
        self.log.append(
            self.variant.name
            + (f" {threshold}" if threshold is not None else "")
            + (" logits" if logits else "")
        )
        first = [1, 9, 3] if self.variant.name == "ngram" else [1, 2, 3]
        ids = [first if prompt == [1, 2] else [4] for prompt in prompts]
        counted = self.variant.predicts_early
        answer = {
            "seconds": 2.0 if self.variant.name == "baseline" else 1.0,
            "token_ids": ids,
            "ttft_s": [0.1] * len(ids),
            "tpot_s": [0.1 if len(text) > 1 else None for text in ids],
            "speculation": {"drafts": 0, "draft_tokens": 0, "accepted": 0},
            "stats": stats() if counted else None,
        }
        if logits:
            pair = [[2, 8.0], [9, 8.0]]
            answer["top_logits"] = [[pair] * len(text) for text in ids]
        return answer


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeProcess]:
    monkeypatch.setattr(session_module, "VariantProcess", FakeProcess)
    monkeypatch.setattr(FakeProcess, "log", [])
    monkeypatch.setattr(FakeProcess, "prompts", [])
    monkeypatch.setattr(FakeProcess, "policies", [])
    monkeypatch.setattr(FakeProcess, "broken", set())
    monkeypatch.setattr(FakeProcess, "breaks_in_repeat", {})
    return FakeProcess


def measure(
    variants: str,
    repeats: int = 2,
    cases: list[Case] | None = None,
    output: Path | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    settings = EngineSettings(MODEL, HEADS, dtype=dtype)
    parsed = parse_variants(variants)
    with Session(parsed, settings, WORKLOAD, output=output) as session:
        session.measure(cases or [Case(variant.name) for variant in parsed], repeats)
    return session.results


@pytest.mark.parametrize(("rounds", "expected"), [(None, [2, 2]), (1, [1, 2])])
def test_rounds_bound_the_prompts_of_a_run(
    fake: type[FakeProcess], rounds: int | None, expected: list[int]
) -> None:
    cases = [Case("baseline", size) for size in (1, 2)]
    variants, sizes = parse_variants("baseline"), [1, 2]
    with Session(
        variants, SETTINGS, WORKLOAD, batch_sizes=sizes, rounds=rounds
    ) as session:
        session.measure(cases, 1)
    assert fake.prompts == expected


def labels(results: dict[str, Any]) -> list[str]:
    return [case["label"] for case in results["cases"]]


def test_variants_take_turns(fake: type[FakeProcess]) -> None:
    results = measure("baseline,adadecode,ngram")
    order = ["baseline", "adadecode", "ngram"]
    assert fake.log[:6] == order * 2
    assert labels(results) == order
    figures = results["cases"][1]["figures"]
    assert figures["ratio"]["median"] == 2.0
    assert figures["texts"] == {"same": 4, "ties": 0, "different": 0}
    assert figures["efficiency"]["median"] > 0
    assert results["cases"][2]["figures"]["texts"]["different"] == 2


def test_in_bfloat16_the_baseline_says_what_a_tie_is(fake: type[FakeProcess]) -> None:
    results = measure("baseline,ngram", dtype="bfloat16")
    assert fake.log.count("baseline logits") == 1
    texts = results["cases"][1]["figures"]["texts"]
    assert texts == {"same": 2, "ties": 2, "different": 0}


def test_only_texts_that_part_are_generated_again(fake: type[FakeProcess]) -> None:
    measure("baseline,ngram", 1, dtype="bfloat16")
    assert fake.prompts == [2, 2, 1]
    measure("baseline,ngram", 1, [Case("ngram", 2)], dtype="bfloat16")
    assert fake.prompts[3:] == [2, 2, 2], "beside others it is another job"


def test_repeats_share_the_prompts(fake: type[FakeProcess]) -> None:
    settings = EngineSettings(MODEL, HEADS, dtype="bfloat16")
    with Session(
        parse_variants("baseline,ngram"), settings, WORKLOAD, split_prompts=True
    ) as session:
        session.measure([Case("ngram")], 2)
    assert fake.log[:5] == ["baseline", "ngram", "baseline logits", "baseline", "ngram"]
    case = session.results["cases"][1]
    assert [run["prompts"] for run in case["runs"]] == [[0, 1], [1, 2]]
    assert [run["tokens"] for run in case["runs"]] == [3, 1]
    assert case["figures"]["texts"] == {"same": 1, "ties": 1, "different": 0}


def test_policies_are_rows_of_their_own(fake: type[FakeProcess]) -> None:
    cases = [Case("adadecode", 1, {"threshold": t}) for t in (0.3, 0.9)]
    results = measure("baseline,adadecode", 1, [*cases, Case("adadecode")])
    assert fake.log[:4] == [
        "baseline",
        "adadecode 0.3",
        "adadecode 0.9",
        "adadecode 0.75",  # the settings' own again
    ]
    assert labels(results)[1:] == [
        "adadecode, threshold 0.3",
        "adadecode, threshold 0.9",
        "adadecode",
    ]


def test_the_prediction_counts_what_memory_costs(
    fake: type[FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    def predicted() -> float:
        (run,) = measure("baseline,adadecode", 1)["cases"][1]["runs"]
        return float(run["predicted_speedup"])

    without = predicted()
    config = load_heads_config(HEADS).model_copy(update={"memory": True})
    monkeypatch.setattr("adadecode_vllm.heads.load_heads_config", lambda _: config)
    assert predicted() < without


def test_an_engine_is_told_only_what_a_case_changes(fake: type[FakeProcess]) -> None:
    """A threshold among it, even the engine's own, would end deciding by costs."""
    cases = [Case("adadecode", 1, {"max_early_predictions": cap}) for cap in (2, 4)]
    measure("baseline,adadecode", 2, cases)
    assert fake.policies == [case.policy for case in cases] * 2


@pytest.mark.parametrize(
    ("variant", "changed", "back"),
    [
        ("adadecode", {"max_early_predictions": 2}, {"max_early_predictions": 8}),
        ("adadecode", {"threshold": 0.3}, {"threshold": 0.75, "policy": "cost"}),
        (
            "adadecode",
            {"synthetic_acceptance_rate": 0.5},
            {"synthetic_acceptance_rate": None, "policy": "cost"},
        ),
        ("threshold-1", {"threshold": 0.3}, {"threshold": 1.0, "policy": "threshold"}),
        ("paper", {"max_early_predictions": 2}, {"max_early_predictions": 5}),
    ],
)
def test_what_a_case_changed_is_put_back_for_the_next(
    fake: type[FakeProcess],
    variant: str,
    changed: dict[str, Any],
    back: dict[str, Any],
) -> None:
    cases = [Case(variant, 1, changed), Case(variant), Case(variant, 2)]
    measure(f"baseline,{variant}", 1, cases)
    assert fake.policies == [changed, back]


def test_the_next_cases_own_changes_stand(fake: type[FakeProcess]) -> None:
    first = {"threshold": 0.3, "max_early_predictions": 2}
    measure(
        "baseline,adadecode",
        1,
        [Case("adadecode", 1, first), Case("adadecode", 1, {"threshold": 0.9})],
    )
    assert fake.policies == [first, {"max_early_predictions": 8, "threshold": 0.9}]


def test_an_variant_that_does_not_start_is_noted(fake: type[FakeProcess]) -> None:
    fake.broken.add("ngram")
    results = measure("baseline,ngram,draft-model,adadecode")
    assert labels(results) == ["baseline", "adadecode"]
    assert results["variants"]["ngram"] == {
        "status": "failed",
        "reason": "it is broken",
    }
    assert results["variants"]["draft-model"]["status"] == "skipped"
    assert {"end baseline", "end adadecode"} <= set(fake.log)


def test_an_variant_that_ends_on_the_way_keeps_its_repeats(
    fake: type[FakeProcess],
) -> None:
    fake.breaks_in_repeat["ngram"] = 2
    results = measure("baseline,ngram,adadecode", repeats=3)
    repeats = {case["variant"]: len(case["runs"]) for case in results["cases"]}
    assert repeats == {"baseline": 3, "ngram": 1, "adadecode": 3}
    assert results["variants"]["ngram"]["status"] == "failed"


def test_variants_can_be_loaded_a_few_at_a_time(fake: type[FakeProcess]) -> None:
    settings = EngineSettings(MODEL, HEADS, dtype="float32")
    variants = parse_variants("baseline,adadecode,ngram,threshold-1")
    with Session(variants, settings, WORKLOAD) as session:
        cases = [Case(variant.name, size) for size in (1, 2) for variant in variants]
        session.measure(cases, 1, side_by_side=2)
        results = session.results
    first, second = fake.log[:8], fake.log[8:]
    assert first == [
        *("baseline", "adadecode", "ngram") * 2,
        *("end ngram", "end adadecode"),
    ]
    assert second == [
        *("baseline", "threshold-1") * 2,
        *("end threshold-1", "end baseline"),
    ]
    assert [(case["batch_size"], case["variant"]) for case in results["cases"]] == [
        (size, variant.name) for size in (1, 2) for variant in variants
    ]
    # The baseline ran once with each group, each ratio is to the run beside it.
    assert [len(case["runs"]) for case in results["cases"][:4]] == [2, 1, 1, 1]


def test_without_the_baseline_nothing_is_measured(fake: type[FakeProcess]) -> None:
    with pytest.raises(AdaDecodeError, match="'baseline' is missing"):
        measure("adadecode")
    fake.broken.add("baseline")
    with pytest.raises(VariantError):
        measure("baseline,adadecode")


def test_a_killed_run_keeps_finished_repeats(
    fake: type[FakeProcess], tmp_path: Path
) -> None:
    fake.breaks_in_repeat["baseline"] = 3
    output = tmp_path / "out.json"
    with pytest.raises(VariantError):
        measure("baseline,adadecode", repeats=5, output=output)
    kept = json.loads(output.read_text())
    assert [len(case["runs"]) for case in kept["cases"]] == [2, 2]
    assert "adadecode" in kept["table"]
    assert "token_ids" not in kept["cases"][0]["runs"][0]


def test_a_comparison_that_lacks_a_variant_is_no_success(
    capsys: pytest.CaptureFixture[str],
) -> None:
    variants: dict[str, Any] = {
        "baseline": {"status": "ran"},
        "ngram": {"status": "failed", "reason": "it is broken"},
        "transformers": {"status": "skipped", "reason": "has no batches"},
    }
    with pytest.raises(SystemExit) as ended:
        print_results({"variants": variants}, "a table")
    assert ended.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == "a table\n"
    assert "--variants: ngram failed" in printed.err
    del variants["ngram"]
    print_results({"variants": variants}, "a table")
    assert not capsys.readouterr().err
