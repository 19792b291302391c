# SPDX-License-Identifier: Apache-2.0
"""Which arms run, in which order, and what is kept when something fails."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from adadecode_vllm.errors import AdaDecodeError
from benchmarks import session as session_module
from benchmarks.arms import (
    ARMS,
    Arm,
    EngineSettings,
    llm_arguments,
    obstacle,
    parse_arms,
)
from benchmarks.options import make_parser, numbers, settings_from
from benchmarks.process import ArmError, log_reason
from benchmarks.session import Case, Session
from benchmarks.study import STUDIES, study_parser
from benchmarks.workloads import Workload
from tests.harness import HEADS, MODEL
from tests.unit.test_benchmark_figures import stats

SETTINGS = EngineSettings(MODEL, HEADS, dtype="float32", threshold=0.75)
WORKLOAD = Workload("text", [[1, 2], [3]], ["a", "b"], False, 4, "two prompts", "ab")


def test_arms_are_read_in_order() -> None:
    assert parse_arms("ordinary, single-exit:4,ngram") == [
        Arm("ordinary", "ordinary"),
        Arm("single-exit:4", "single-exit", "4"),
        Arm("ngram", "ngram"),
    ]
    valued = {"submit-all", "exits", "heads", "draft-vocabulary"}
    plain = [name for name in ARMS if name not in valued]
    assert [arm.kind for arm in parse_arms(",".join(plain))] == plain
    text = "submit-all:4,exits:2+8,heads:some/dir,draft-vocabulary:64"
    assert [arm.value for arm in parse_arms(text)] == ["4", "2+8", "some/dir", "64"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ordinary,eagle", "unknown arm 'eagle'"),
        ("ordinary,single-exit:four", "single-exit takes a layer"),
        ("ngram:4", "ngram takes no value"),
        ("exits", "exits takes layers"),
        ("exits:2+x", "exits takes layers"),
        ("heads", "heads takes a directory"),
        ("ngram,ngram", "named twice"),
        (" ,", "no arm is named"),
    ],
)
def test_wrong_arms_are_refused(text: str, reason: str) -> None:
    with pytest.raises(AdaDecodeError, match=reason):
        parse_arms(text)


def test_arms_that_cannot_run_say_why() -> None:
    draft = Arm("draft-model", "draft-model")
    assert "--draft-model" in (obstacle(draft, SETTINGS, [1]) or "")
    missing = EngineSettings(MODEL, HEADS, draft_model="nowhere")
    assert "nowhere" in (obstacle(draft, missing, [1]) or "")
    assert obstacle(draft, EngineSettings(MODEL, HEADS, draft_model=MODEL), [1]) is None
    early = Arm("transformers-early-exit", "transformers-early-exit")
    assert obstacle(early, SETTINGS, [1, 4]) is None
    assert "one request" in (obstacle(early, SETTINGS, [2, 4]) or "")


def test_each_arm_asks_for_its_own_engine() -> None:
    ordinary = llm_arguments(Arm("ordinary", "ordinary"), SETTINGS)
    assert "additional_config" not in ordinary
    assert "speculative_config" not in ordinary
    ngram = llm_arguments(Arm("ngram", "ngram"), SETTINGS)
    assert ngram["speculative_config"]["num_speculative_tokens"] == 5
    single = llm_arguments(Arm("single-exit:4", "single-exit", "4"), SETTINGS)
    assert single["additional_config"]["adadecode"]["exit_layers"] == (4,)
    first = llm_arguments(Arm("single-exit", "single-exit"), SETTINGS)
    assert first["additional_config"]["adadecode"]["exit_layers"] == (2,)
    never = llm_arguments(Arm("threshold-1", "threshold-1"), SETTINGS)
    assert never["additional_config"]["adadecode"]["threshold"] == 1.0
    always = llm_arguments(Arm("submit-all:4", "submit-all", "4"), SETTINGS)
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
    found = llm_arguments(Arm("paper", "paper"), best)["additional_config"]["adadecode"]
    assert (found["threshold"], found["max_early_predictions"]) == (0.75, 5)
    assert found["last_guess"] is False
    assert not {"exit_layers", "gate"} & found.keys()


def test_a_users_engine_arguments_come_last() -> None:
    settings = EngineSettings(
        MODEL, HEADS, arguments={"enable_prefix_caching": True, "max_num_seqs": 4}
    )
    found = llm_arguments(Arm("ordinary", "ordinary"), settings)
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
    """An arm without an engine: `log` says what was asked of all of them."""

    log: ClassVar[list[str]] = []
    prompts: ClassVar[list[int]] = []
    broken: ClassVar[set[str]] = set()
    breaks_in_turn: ClassVar[dict[str, int]] = {}

    def __init__(
        self, arm: Arm, settings: EngineSettings, logs: Path | None = None
    ) -> None:
        if arm.name in self.broken:
            raise ArmError("it is broken")
        self.arm = arm
        self.start_up_seconds = 1.0
        self.turn = 0
        self.policy: dict[str, Any] = {}

    def __enter__(self) -> "FakeProcess":
        return self

    def __exit__(self, *_: Any) -> None:
        self.log.append(f"end {self.arm.name}")

    def configure(self, **policy: Any) -> None:
        self.policy = policy

    def memory_mib(self) -> dict[str, float]:
        return {"peak_memory_mib": 2.0, "private_memory_mib": 1.0}

    def generate(self, prompts: Any, **options: Any) -> dict[str, Any]:
        if options["output_tokens"] != WORKLOAD.output_tokens:
            return {}
        self.prompts.append(len(prompts))
        self.turn += 1
        if self.turn == self.breaks_in_turn.get(self.arm.name):
            raise ArmError("it ended")
        threshold = self.policy.get("threshold")
        logits = options.get("top_logits", False)
        self.log.append(
            self.arm.name
            + (f" {threshold}" if threshold is not None else "")
            + (" logits" if logits else "")
        )
        ids = [[1, 2, 3], [4]]
        if self.arm.name == "ngram":
            ids = [[1, 9, 3], [4]]
        counted = self.arm.predicts_early
        answer = {
            "seconds": 2.0 if self.arm.name == "ordinary" else 1.0,
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
    monkeypatch.setattr(session_module, "ArmProcess", FakeProcess)
    monkeypatch.setattr(FakeProcess, "log", [])
    monkeypatch.setattr(FakeProcess, "prompts", [])
    monkeypatch.setattr(FakeProcess, "broken", set())
    monkeypatch.setattr(FakeProcess, "breaks_in_turn", {})
    return FakeProcess


def measure(
    arms: str,
    repeats: int = 2,
    cases: list[Case] | None = None,
    output: Path | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    settings = EngineSettings(MODEL, HEADS, dtype=dtype)
    parsed = parse_arms(arms)
    with Session(parsed, settings, WORKLOAD, output=output) as session:
        session.measure(cases or [Case(arm.name) for arm in parsed], repeats)
    return session.results


@pytest.mark.parametrize(("rounds", "expected"), [(None, [2, 2]), (1, [1, 2])])
def test_rounds_bound_the_prompts_of_a_run(
    fake: type[FakeProcess], rounds: int | None, expected: list[int]
) -> None:
    cases = [Case("ordinary", size) for size in (1, 2)]
    arms, sizes = parse_arms("ordinary"), [1, 2]
    with Session(arms, SETTINGS, WORKLOAD, batch_sizes=sizes, rounds=rounds) as session:
        session.measure(cases, 1)
    assert fake.prompts == expected


def labels(results: dict[str, Any]) -> list[str]:
    return [case["label"] for case in results["cases"]]


def test_arms_take_turns(fake: type[FakeProcess]) -> None:
    results = measure("ordinary,adadecode,ngram")
    turn = ["ordinary", "adadecode", "ngram"]
    assert fake.log[:6] == turn * 2
    assert labels(results) == turn
    figures = results["cases"][1]["figures"]
    assert figures["ratio"]["median"] == 2.0
    assert figures["texts"] == {"same": 4, "ties": 0, "different": 0}
    assert figures["efficiency"]["median"] > 0
    assert results["cases"][2]["figures"]["texts"]["different"] == 2


def test_in_bfloat16_the_reference_says_what_a_tie_is(fake: type[FakeProcess]) -> None:
    results = measure("ordinary,ngram", dtype="bfloat16")
    assert fake.log.count("ordinary logits") == 1
    texts = results["cases"][1]["figures"]["texts"]
    assert texts == {"same": 2, "ties": 2, "different": 0}


def test_policies_are_rows_of_their_own(fake: type[FakeProcess]) -> None:
    cases = [Case("adadecode", 1, {"threshold": t}) for t in (0.3, 0.9)]
    results = measure("ordinary,adadecode", 1, [*cases, Case("adadecode")])
    assert fake.log[:4] == [
        "ordinary",
        "adadecode 0.3",
        "adadecode 0.9",
        "adadecode 0.75",  # the settings' own again
    ]
    assert labels(results)[1:] == [
        "adadecode, threshold 0.3",
        "adadecode, threshold 0.9",
        "adadecode",
    ]


def test_an_arm_that_does_not_start_is_noted(fake: type[FakeProcess]) -> None:
    fake.broken.add("ngram")
    results = measure("ordinary,ngram,draft-model,adadecode")
    assert labels(results) == ["ordinary", "adadecode"]
    assert results["arms"]["ngram"] == {"status": "failed", "reason": "it is broken"}
    assert results["arms"]["draft-model"]["status"] == "skipped"
    assert {"end ordinary", "end adadecode"} <= set(fake.log)


def test_an_arm_that_ends_on_the_way_keeps_its_turns(fake: type[FakeProcess]) -> None:
    fake.breaks_in_turn["ngram"] = 2
    results = measure("ordinary,ngram,adadecode", repeats=3)
    turns = {case["arm"]: len(case["runs"]) for case in results["cases"]}
    assert turns == {"ordinary": 3, "ngram": 1, "adadecode": 3}
    assert results["arms"]["ngram"]["status"] == "failed"


def test_arms_can_be_loaded_a_few_at_a_time(fake: type[FakeProcess]) -> None:
    settings = EngineSettings(MODEL, HEADS, dtype="float32")
    arms = parse_arms("ordinary,adadecode,ngram,threshold-1")
    with Session(arms, settings, WORKLOAD) as session:
        cases = [Case(arm.name, size) for size in (1, 2) for arm in arms]
        session.measure(cases, 1, side_by_side=2)
        results = session.results
    first, second = fake.log[:8], fake.log[8:]
    assert first == [
        *("ordinary", "adadecode", "ngram") * 2,
        *("end ngram", "end adadecode"),
    ]
    assert second == [
        *("ordinary", "threshold-1") * 2,
        *("end threshold-1", "end ordinary"),
    ]
    assert [(case["batch_size"], case["arm"]) for case in results["cases"]] == [
        (size, arm.name) for size in (1, 2) for arm in arms
    ]
    # The reference ran once with each group, each ratio is to the run beside it.
    assert [len(case["runs"]) for case in results["cases"][:4]] == [2, 1, 1, 1]


def test_without_the_reference_nothing_is_measured(fake: type[FakeProcess]) -> None:
    with pytest.raises(AdaDecodeError, match="'ordinary' is missing"):
        measure("adadecode")
    fake.broken.add("ordinary")
    with pytest.raises(ArmError):
        measure("ordinary,adadecode")


def test_a_killed_run_keeps_finished_turns(
    fake: type[FakeProcess], tmp_path: Path
) -> None:
    fake.breaks_in_turn["ordinary"] = 3
    output = tmp_path / "out.json"
    with pytest.raises(ArmError):
        measure("ordinary,adadecode", repeats=5, output=output)
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
    assert plan.arms[0].name == "ordinary"
    names = {arm.name for arm in plan.arms}
    assert plan.cases
    assert {case.arm for case in plan.cases} <= names
    labels = [(case.batch_size, case.label) for case in plan.cases]
    assert len(set(labels)) == len(labels)


def test_a_cap_study_reserves_room_for_its_largest_cap() -> None:
    arguments = ["cap", "--values", "2,8", "--model", MODEL, "--adadecode-heads", HEADS]
    args = study_parser().parse_args(arguments)
    plan = STUDIES["cap"][1](settings_from(args), args)
    assert plan.settings.max_early_predictions == 8
    assert [case.label for case in plan.cases] == [
        "adadecode, cap 2",
        "adadecode, cap 8",
    ]
