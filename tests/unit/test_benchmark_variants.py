# SPDX-License-Identifier: Apache-2.0
"""Which variants run and with what: options, engine arguments, plans of studies."""

from pathlib import Path

import pytest

from adadecode_vllm import engine_args
from adadecode_vllm.errors import AdaDecodeError
from benchmarks.options import make_parser, numbers, settings_from
from benchmarks.study import STUDIES, study_parser
from benchmarks.variants import (
    VARIANTS,
    EngineSettings,
    Variant,
    llm_arguments,
    parse_variants,
    reason_to_skip,
)
from tests.harness import HEADS, MODEL
from tests.throughput_benchmark import SETTINGS


def test_variants_are_read_in_order() -> None:
    assert parse_variants("baseline, single-exit:4,ngram") == [
        Variant("baseline", "baseline"),
        Variant("single-exit:4", "single-exit", "4"),
        Variant("ngram", "ngram"),
    ]
    valued = {"submit-all", "exits", "heads", "defaults", "draft-vocabulary"}
    plain = [name for name in VARIANTS if name not in valued]
    assert [variant.kind for variant in parse_variants(",".join(plain))] == plain
    text = "submit-all:4,exits:2+8,heads:some/dir,defaults:dir,draft-vocabulary:64"
    assert [variant.value for variant in parse_variants(text)] == [
        "4",
        "2+8",
        "some/dir",
        "dir",
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


def test_defaults_do_not_depend_on_the_options_either() -> None:
    given = EngineSettings(MODEL, "other", threshold=0.5, adadecode={"ngram": "off"})
    found = llm_arguments(Variant(f"defaults:{HEADS}", "defaults", HEADS), given)
    assert found["additional_config"] == engine_args(HEADS)["additional_config"]


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
