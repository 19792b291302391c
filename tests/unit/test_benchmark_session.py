# SPDX-License-Identifier: Apache-2.0
"""Which variants run, in which order, and what is kept when something fails."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.heads import load_heads_config
from benchmarks import session as session_module
from benchmarks.options import make_parser, numbers, settings_from
from benchmarks.process import VariantError, log_reason
from benchmarks.session import Case, Session
from benchmarks.study import STUDIES, study_parser
from benchmarks.variants import (
    VARIANTS,
    EngineSettings,
    Variant,
    llm_arguments,
    parse_variants,
    reason_to_skip,
)
from benchmarks.workloads import Workload
from tests.harness import HEADS, MODEL
from tests.unit.test_benchmark_figures import stats

SETTINGS = EngineSettings(MODEL, HEADS, dtype="float32")
WORKLOAD = Workload("text", [[1, 2], [3]], ["a", "b"], False, 4, "two prompts", "ab")


def test_variants_are_read_in_order() -> None:
    assert parse_variants("baseline, single-exit:4,ngram") == [
        Variant("baseline", "baseline"),
        Variant("single-exit:4", "single-exit", "4"),
        Variant("ngram", "ngram"),
    ]
    valued = {"submit-all", "exits", "heads", "draft-vocabulary"}
    plain = [name for name in VARIANTS if name not in valued]
    assert [variant.kind for variant in parse_variants(",".join(plain))] == plain
    text = "submit-all:4,exits:2+8,heads:some/dir,draft-vocabulary:64"
    assert [variant.value for variant in parse_variants(text)] == [
        "4",
        "2+8",
        "some/dir",
        "64",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("baseline,eagle", "unknown variant 'eagle'"),
        ("baseline,single-exit:four", "single-exit takes a layer"),
        ("ngram:four", "ngram takes a number of drafts"),
        ("baseline:4", "baseline takes no value"),
        ("exits", "exits takes layers"),
        ("exits:2+x", "exits takes layers"),
        ("heads", "heads takes a directory"),
        ("ngram,ngram", "named twice"),
        (" ,", "no variant is named"),
    ],
)
def test_wrong_variants_are_refused(text: str, reason: str) -> None:
    with pytest.raises(AdaDecodeError, match=reason):
        parse_variants(text)


def test_variants_that_cannot_run_say_why() -> None:
    draft = Variant("draft-model", "draft-model")
    assert "--draft-model" in (reason_to_skip(draft, SETTINGS, [1]) or "")
    missing = EngineSettings(MODEL, HEADS, draft_model="nowhere")
    assert "nowhere" in (reason_to_skip(draft, missing, [1]) or "")
    assert (
        reason_to_skip(draft, EngineSettings(MODEL, HEADS, draft_model=MODEL), [1])
        is None
    )
    early = Variant("transformers-early-exit", "transformers-early-exit")
    assert reason_to_skip(early, SETTINGS, [1, 4]) is None
    assert "one request" in (reason_to_skip(early, SETTINGS, [2, 4]) or "")


def test_each_variant_asks_for_its_own_engine() -> None:
    baseline = llm_arguments(Variant("baseline", "baseline"), SETTINGS)
    assert "additional_config" not in baseline
    assert "speculative_config" not in baseline
    ngram = llm_arguments(Variant("ngram", "ngram"), SETTINGS)
    assert ngram["speculative_config"]["num_speculative_tokens"] == 8
    three = llm_arguments(Variant("ngram:3", "ngram", "3"), SETTINGS)
    assert three["speculative_config"]["num_speculative_tokens"] == 3
    single = llm_arguments(Variant("single-exit:4", "single-exit", "4"), SETTINGS)
    assert single["additional_config"]["adadecode"]["exit_layers"] == (4,)
    first = llm_arguments(Variant("single-exit", "single-exit"), SETTINGS)
    assert first["additional_config"]["adadecode"]["exit_layers"] == (2,)
    never = llm_arguments(Variant("threshold-1", "threshold-1"), SETTINGS)
    assert never["additional_config"]["adadecode"]["threshold"] == 1.0
    always = llm_arguments(Variant("submit-all:4", "submit-all", "4"), SETTINGS)
    assert always["additional_config"]["adadecode"]["threshold"] == 0.0
    assert always["additional_config"]["adadecode"]["exit_layers"] == (4,)


def test_the_papers_setting_does_not_depend_on_the_options() -> None:
    best = EngineSettings(
        MODEL,
        HEADS,
        threshold=0.5,
        max_early_predictions=3,
        adadecode={"exit_layers": [2], "gate": "acceptance"},
    )
    found = llm_arguments(Variant("paper", "paper"), best)["additional_config"][
        "adadecode"
    ]
    assert (found["threshold"], found["max_early_predictions"]) == (0.75, 5)
    assert found["last_guess"] is False
    assert not {"exit_layers", "gate"} & found.keys()


def test_a_users_engine_arguments_come_last() -> None:
    settings = EngineSettings(
        MODEL, HEADS, arguments={"enable_prefix_caching": True, "max_num_seqs": 4}
    )
    found = llm_arguments(Variant("baseline", "baseline"), settings)
    assert found["enable_prefix_caching"] is True
    assert found["max_num_seqs"] == 4


def test_options_are_vllms_own() -> None:
    parser = make_parser("A benchmark.")
    args = parser.parse_args(
        [
            *("--model", MODEL, "--adadecode-heads", HEADS, "--max-model-len", "256"),
            *("--adadecode-config", '{"threshold": 0.5, "gate": "acceptance"}'),
            *("--dtype", "float32", "--enforce-eager"),
        ]
    )
    settings = settings_from(args)
    assert settings.threshold == 0.5
    assert settings.adadecode == {"gate": "acceptance"}
    assert settings.arguments == {"max_model_len": 256, "enforce_eager": True}


def test_missing_heads_are_refused_with_the_flag() -> None:
    parser = make_parser("A benchmark.")
    args = parser.parse_args(["--model", MODEL])
    with pytest.raises(AdaDecodeError, match="--adadecode-heads"):
        settings_from(args)


@pytest.mark.parametrize(
    ("flag", "number", "reason"),
    [
        ("--repeats", 0, "nothing would be measured"),
        ("--rounds", 0, "no prompt would be sent"),
        ("--start-together", 0, "no engine would start"),
        ("--side-by-side", -1, "no engine would be loaded"),
    ],
)
def test_less_than_one_is_refused(flag: str, number: int, reason: str) -> None:
    parser = make_parser("A benchmark.")
    given = ["--model", MODEL, "--adadecode-heads", HEADS, f"{flag}={number}"]
    with pytest.raises(AdaDecodeError) as refused:
        settings_from(parser.parse_args(given))
    assert str(refused.value) == f"{flag} {number}: {reason}. Give at least 1."


def test_lists_of_numbers() -> None:
    assert numbers("--batch-sizes", "1,2", int, lambda n: n > 0) == [1, 2]
    for text in ("", "1,x", "0"):
        with pytest.raises(AdaDecodeError, match="--batch-sizes"):
            numbers("--batch-sizes", text, int, lambda n: n > 0)


def test_a_log_is_cut_to_its_last_sentence() -> None:
    log = "a\nRuntimeError: Engine core failed\nb\nValueError: too long\nc\n"
    assert log_reason(log) == "ValueError: too long"
    assert log_reason("x\n" * 40).count("x") == 20


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
        ids = [[1, 2, 3], [4]]
        if self.variant.name == "ngram":
            ids = [[1, 9, 3], [4]]
        counted = self.variant.predicts_early
        answer = {
            "seconds": 2.0 if self.variant.name == "baseline" else 1.0,
            "token_ids": ids,
            "ttft_s": [0.1, 0.1],
            "tpot_s": [0.1, None],
            "speculation": {"drafts": 0, "draft_tokens": 0, "accepted": 0},
            "stats": stats() if counted else None,
        }
        if logits:
            pair = [[2, 8.0], [9, 8.0]]
            answer["top_logits"] = [[pair, pair, pair], [pair]]
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


@pytest.mark.parametrize("study", list(STUDIES))
def test_every_study_has_a_plan(study: str, tmp_path: Path) -> None:
    """From the command line to the cases, without an engine."""
    args = study_parser().parse_args(
        [study, "--model", MODEL, "--adadecode-heads", HEADS]
    )
    plan = STUDIES[study][1](settings_from(args), args)
    assert plan.variants[0].name == "baseline"
    names = {variant.name for variant in plan.variants}
    assert plan.cases
    assert {case.variant for case in plan.cases} <= names
    labels = [(case.batch_size, case.label) for case in plan.cases]
    assert len(set(labels)) == len(labels)


def test_a_cap_study_reserves_its_largest_cap() -> None:
    arguments = ["cap", "--values", "2,8", "--model", MODEL, "--adadecode-heads", HEADS]
    args = study_parser().parse_args(arguments)
    plan = STUDIES["cap"][1](settings_from(args), args)
    assert plan.settings.max_early_predictions == 8
    assert [case.label for case in plan.cases] == [
        "adadecode, cap 2",
        "adadecode, cap 8",
    ]
