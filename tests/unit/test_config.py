# SPDX-License-Identifier: Apache-2.0
"""The options in Python, in JSON and on the command line."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import adadecode_vllm
from adadecode_vllm.config import AdaDecodeConfig, engine_args, parse_config
from adadecode_vllm.engine.arguments import (
    add_cli_flags,
    merge_into_additional_config,
    options_from_flags,
)
from adadecode_vllm.errors import AdaDecodeError


def refusal(options: Any) -> str:
    with pytest.raises(AdaDecodeError) as caught:
        parse_config(options)
    return str(caught.value)


# The schema


def test_defaults() -> None:
    assert parse_config({"heads": "H"}).model_dump() == {
        "heads": "H",
        "exit_layers": None,
        "threshold": 0.75,
        "max_early_predictions": 8,
        "gate": "probability",
        "draft_vocabulary_size": None,
        "last_guess": True,
        "ngram": "chain",
        "lookup": "ngram",
        "disable_by_batch_size": None,
        "policy": "cost",
        "synthetic_acceptance_rate": None,
        "enabled": True,
    }


@pytest.mark.parametrize(
    ("options", "policy", "ngram"),
    [
        ({"threshold": 0.6}, "threshold", "off"),
        ({"gate": "acceptance"}, "threshold", "off"),
        ({"last_guess": False}, "threshold", "off"),
        ({"policy": "threshold"}, "threshold", "off"),
        ({"threshold": 0.6, "ngram": "tail"}, "threshold", "tail"),
        ({"threshold": 1.0, "policy": "cost"}, "cost", "chain"),
        ({"max_early_predictions": 3, "disable_by_batch_size": 8}, "cost", "chain"),
        ({"ngram": "off"}, "cost", "off"),
    ],
)
def test_a_threshold_decides_in_place_of_costs(
    options: dict[str, Any], policy: str, ngram: str
) -> None:
    config = parse_config({"heads": "H", **options})
    assert (config.policy, config.ngram) == (policy, ngram)
    assert parse_config(config.model_dump(exclude_unset=True)) == config


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 0},
        {"threshold": 1.0},
        {"max_early_predictions": 1},
        {"max_early_predictions": 128},
        {"exit_layers": [1]},
        {"exit_layers": (2, 3, 9)},
        {"enabled": False},
    ],
)
def test_accepted(options: dict[str, Any]) -> None:
    config = parse_config({"heads": "H", **options})
    assert parse_config(config) is config
    assert parse_config(json.loads(config.model_dump_json())) == config
    for name, value in options.items():
        found = getattr(config, name)
        assert (list(found) if name == "exit_layers" else found) == (
            list(value) if name == "exit_layers" else value
        )


@pytest.mark.parametrize(
    ("options", "given", "reason"),
    [
        ({"threshold": -0.1}, "threshold = -0.1", "greater than or equal to 0"),
        ({"threshold": 1.1}, "threshold = 1.1", "less than or equal to 1"),
        ({"threshold": math.nan}, "threshold = nan", "less than or equal to 1"),
        ({"threshold": "high"}, "threshold = 'high'", "valid number"),
        (
            {"max_early_predictions": 0},
            "max_early_predictions = 0",
            "greater than or equal to 1",
        ),
        (
            {"max_early_predictions": 129},
            "max_early_predictions = 129",
            "less than or equal to 128",
        ),
        (
            {"max_early_predictions": 2.5},
            "max_early_predictions = 2.5",
            "valid integer",
        ),
        ({"exit_layers": []}, "exit_layers = []", "at least 1 item"),
        (
            {"exit_layers": [2, 1]},
            "exit_layers = [2, 1]",
            "[2, 1] is not strictly increasing",
        ),
        (
            {"exit_layers": [2, 2]},
            "exit_layers = [2, 2]",
            "[2, 2] is not strictly increasing",
        ),
        ({"exit_layers": ["x"]}, "exit_layers.0 = 'x'", "valid integer"),
        ({"enabled": "maybe"}, "enabled = 'maybe'", "valid boolean"),
        ({"heads": ""}, "heads = ''", "at least 1 character"),
        ({"heads": 5}, "heads = 5", "valid string"),
    ],
)
def test_refused_with_flag_reason_and_remedy(
    options: dict[str, Any], given: str, reason: str
) -> None:
    message = refusal({"heads": "H", **options})
    (option,) = options
    assert message.startswith(f"--adadecode-config: {given} is refused: ")
    assert reason in message
    description = AdaDecodeConfig.model_fields[option].description
    assert description is not None
    assert message.endswith(f"Give a valid {option} ({description[:-1]}).")
    assert "\n" not in message
    assert "pydantic" not in message


def test_unknown_option() -> None:
    assert refusal({"heads": "H", "treshold": 0.5}) == (
        "--adadecode-config: unknown option 'treshold'. Options are heads, "
        "exit_layers, threshold, max_early_predictions, gate, draft_vocabulary_size, "
        "last_guess, ngram, lookup, disable_by_batch_size, policy, "
        "synthetic_acceptance_rate, enabled; "
        "remove or correct it."
    )


def test_missing_heads() -> None:
    for options in ({}, {"threshold": 0.5}):
        message = refusal(options)
        assert message.startswith("--adadecode-heads: no exit heads given. Name the ")
        assert "`adadecode data` and `adadecode train`" in message


@pytest.mark.parametrize("options", [None, 5, "heads", ["heads"], True])
def test_no_object(options: Any) -> None:
    message = refusal(options)
    assert f"expected an object with options, got {options!r}. Write" in message


def test_every_mistake_is_named() -> None:
    message = refusal({"threshold": 2, "max_early_predictions": 0, "color": "red"})
    for part in (
        "no exit heads given",
        "threshold = 2 is refused",
        "max_early_predictions = 0 is refused",
        "unknown option 'color'",
    ):
        assert part in message


def test_frozen() -> None:
    config = parse_config({"heads": "H"})
    with pytest.raises(ValidationError, match="frozen"):
        config.threshold = 0.1


def test_engine_args() -> None:
    assert engine_args("H") == {"additional_config": {"adadecode": {"heads": "H"}}}
    given = engine_args(heads="H", threshold=0.8, exit_layers=[1, 2])
    assert given.keys() == {"additional_config"}
    assert given["additional_config"].keys() == {"adadecode"}
    options = given["additional_config"]["adadecode"]
    assert {**options, "exit_layers": list(options["exit_layers"])} == {
        "heads": "H",
        "threshold": 0.8,
        "exit_layers": [1, 2],
    }
    assert adadecode_vllm.engine_args is engine_args


def test_engine_args_takes_a_path() -> None:
    options = engine_args(Path("some") / "heads")["additional_config"]["adadecode"]
    assert options == {"heads": str(Path("some") / "heads")}


def test_engine_args_refuses_at_once() -> None:
    with pytest.raises(AdaDecodeError, match=r"threshold = 2 is refused"):
        engine_args("H", threshold=2)
    with pytest.raises(AdaDecodeError, match="unknown option 'cap'"):
        engine_args("H", cap=2)


# The flags


def parse_flags(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_cli_flags(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("argv", "options"),
    [
        ([], None),
        (["--plugin", "adadecode"], {}),
        (["--plugin", "adadecode", "--adadecode-heads", "H"], {"heads": "H"}),
        (
            [
                *("--plugin", "adadecode", "--adadecode-heads", "H"),
                *("--adadecode-config", '{"threshold": 0.5}'),
            ],
            {"heads": "H", "threshold": 0.5},
        ),
        (
            ["--plugin", "adadecode", "--adadecode-config", '{"heads": "H"}'],
            {"heads": "H"},
        ),
        (
            [
                *("--plugin", "adadecode", "--adadecode-heads", "H"),
                *("--adadecode-config", '{"heads": "H"}'),
            ],
            {"heads": "H"},
        ),
    ],
)
def test_flags(argv: list[str], options: dict[str, Any] | None) -> None:
    assert options_from_flags(parse_flags(*argv)) == options


def test_a_parser_without_the_flags() -> None:
    assert options_from_flags(argparse.Namespace(model="m")) is None


@pytest.mark.parametrize(
    ("flag", "value"), [("--adadecode-heads", "H"), ("--adadecode-config", "{}")]
)
def test_flags_without_the_plugin(flag: str, value: str) -> None:
    with pytest.raises(AdaDecodeError) as caught:
        options_from_flags(parse_flags(flag, value))
    assert str(caught.value) == (
        f"{flag}: it has no effect without the plugin. Add --plugin adadecode, or "
        f"remove {flag}."
    )


def test_heads_given_twice() -> None:
    flags = parse_flags(
        *("--plugin", "adadecode", "--adadecode-heads", "A"),
        *("--adadecode-config", '{"heads": "B"}'),
    )
    with pytest.raises(AdaDecodeError) as caught:
        options_from_flags(flags)
    assert str(caught.value) == (
        "--adadecode-heads: 'A' contradicts heads = 'B' in --adadecode-config. Give "
        "it once."
    )


@pytest.mark.parametrize("text", ["{", "threshold=0.5", "", "{'threshold': 0.5}"])
def test_invalid_json(text: str) -> None:
    flags = parse_flags("--plugin", "adadecode", "--adadecode-config", text)
    with pytest.raises(AdaDecodeError) as caught:
        options_from_flags(flags)
    message = str(caught.value)
    assert message.startswith(f"--adadecode-config: {text!r} is not JSON (")
    assert 'Write for example \'{"threshold": 0.8' in message


@pytest.mark.parametrize("text", ["[]", "0.5", "null", '"threshold"', "true"])
def test_json_that_is_no_object(text: str) -> None:
    flags = parse_flags("--plugin", "adadecode", "--adadecode-config", text)
    with pytest.raises(AdaDecodeError) as caught:
        options_from_flags(flags)
    assert str(caught.value).startswith(
        f"--adadecode-config: expected a JSON object, got {text}. Write for example"
    )


@pytest.mark.parametrize("present", [None, {}, {"other": {"x": 1}}])
def test_merge_with_nothing_of_ours(present: dict[str, Any] | None) -> None:
    merged = merge_into_additional_config(present, {"heads": "H"})
    assert merged == {**(present or {}), "adadecode": {"heads": "H"}}
    assert present in (None, {}, {"other": {"x": 1}})  # not changed in place


def test_merge() -> None:
    present = {"other": 1, "adadecode": {"heads": "H", "threshold": 0.5}}
    merged = merge_into_additional_config(
        present, {"threshold": 0.5, "max_early_predictions": 3}
    )
    assert merged == {
        "other": 1,
        "adadecode": {"heads": "H", "threshold": 0.5, "max_early_predictions": 3},
    }
    assert "max_early_predictions" not in present["adadecode"]


def test_merge_contradiction() -> None:
    with pytest.raises(AdaDecodeError) as caught:
        merge_into_additional_config(
            {"adadecode": {"threshold": 0.5}}, {"threshold": 0.6, "heads": "H"}
        )
    assert str(caught.value) == (
        "--adadecode-config: threshold = 0.6 contradicts 0.5 in --additional-config. "
        "Give it once."
    )


@pytest.mark.parametrize("present", [5, "heads", ["heads"]])
def test_merge_with_no_object(present: Any) -> None:
    with pytest.raises(AdaDecodeError) as caught:
        merge_into_additional_config({"adadecode": present}, {"heads": "H"})
    assert str(caught.value).startswith(
        f"--additional-config: adadecode = {present!r} is not an object with options"
    )
