# SPDX-License-Identifier: Apache-2.0
"""The serving benchmark's flags: the server's, the client's and the loads'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adadecode_vllm.errors import AdaDecodeError
from benchmarks import client
from benchmarks.benchmark_serving import check_prompts, parse_loads
from benchmarks.client import Client, Load
from benchmarks.server import engine_flags
from benchmarks.variants import EngineSettings, Variant, llm_arguments
from benchmarks.workloads import Workload
from tests.harness import HEADS, MODEL
from tests.serving_benchmark import SETTINGS, WORKLOAD


def arguments_from(flags: list[str]) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args(["--model", MODEL, *flags]))


class TestFlags:
    @pytest.mark.parametrize("variant", ["baseline", "installed", "ngram"])
    def test_the_server_gets_the_arguments_of_the_engine(self, variant: str) -> None:
        arguments = llm_arguments(Variant(variant, variant), SETTINGS)
        parsed = arguments_from(engine_flags(arguments))
        for name, value in arguments.items():
            assert getattr(parsed, name) == value, name

    def test_switches_lists_and_objects(self) -> None:
        arguments = {
            "model": MODEL,
            "enable_prefix_caching": False,
            "enforce_eager": True,
            "disable_log_stats": True,
            "logits_processors": ["a.B", "c.D"],
            "compilation_config": {"mode": 0},
            "load_format": "-x",
        }
        assert engine_flags(arguments) == [
            "--no-enable-prefix-caching",
            "--enforce-eager",
            "--disable-log-stats",
            *("--logits-processors", "a.B", "c.D"),
            '--compilation-config={"mode": 0}',
            "--load-format=-x",
        ]

    def test_the_plugin_is_asked_for_as_a_user_would(self) -> None:
        flags = engine_flags(llm_arguments(Variant("adadecode", "adadecode"), SETTINGS))
        assert "--plugin=adadecode" in flags
        assert f"--adadecode-heads={HEADS}" in flags
        (config,) = (flag for flag in flags if flag.startswith("--adadecode-config="))
        assert json.loads(config.partition("=")[2]) == {
            "threshold": 0.5,
            "max_early_predictions": 4,
        }
        assert not any(flag.startswith("--additional-config") for flag in flags)

    def test_other_additional_config_stays(self) -> None:
        extra = {"adadecode": {"heads": HEADS}, "other": {"a": 1}}
        assert engine_flags({"model": MODEL, "additional_config": extra}) == [
            "--plugin=adadecode",
            f"--adadecode-heads={HEADS}",
            '--additional-config={"other": {"a": 1}}',
        ]
        assert "adadecode" in extra, "the caller's dictionary was changed"

    def test_without_the_plugin_no_flag_of_it(self) -> None:
        flags = engine_flags(llm_arguments(Variant("baseline", "baseline"), SETTINGS))
        assert not any("plugin" in flag or "adadecode" in flag for flag in flags)

    def test_an_argument_without_a_flag_is_refused(self) -> None:
        with pytest.raises(AdaDecodeError, match=r"^no_such_thing: .* at its default"):
            engine_flags({"model": MODEL, "no_such_thing": 1})


class TestClientFlags:
    def parsed(self, tmp_path: Path, **changes: Any) -> Any:
        workload = Workload(**{**vars(WORKLOAD), **changes.pop("workload", {})})
        arguments = changes.pop("arguments", {})
        settings = EngineSettings(MODEL, HEADS, arguments=arguments)
        sender = Client(settings, workload, tmp_path / "prompts.jsonl")
        load = changes.pop("load", Load(concurrency=2))
        flags = sender.flags("http://127.0.0.1:1", load, 3, 8, ignore_eos=False)
        return client._client_parser().parse_args(flags)

    def test_plain_prompts_go_to_the_completions(self, tmp_path: Path) -> None:
        args = self.parsed(tmp_path)
        assert (args.backend, args.endpoint) == ("openai", "/v1/completions")
        assert args.skip_chat_template
        assert args.disable_shuffle
        assert (args.max_concurrency, args.request_rate) == (2, float("inf"))
        assert (args.num_prompts, args.custom_output_len) == (3, 8)
        assert args.temperature == 0
        assert args.model == args.tokenizer == MODEL

    def test_messages_go_to_the_chat(self, tmp_path: Path) -> None:
        args = self.parsed(tmp_path, workload={"chat": True})
        assert args.backend == "openai-chat"
        assert args.endpoint == "/v1/chat/completions"

    def test_a_rate_has_no_limit_beside_it(self, tmp_path: Path) -> None:
        args = self.parsed(tmp_path, load=Load(request_rate=0.5))
        assert (args.max_concurrency, args.request_rate) == (None, 0.5)

    def test_the_servers_names_are_the_clients(self, tmp_path: Path) -> None:
        given = {"served_model_name": ["a", "b"], "tokenizer": "t"}
        args = self.parsed(tmp_path, arguments=given)
        assert (args.served_model_name, args.tokenizer) == ("a", "t")

    def test_the_client_reads_the_texts_in_order(self, tmp_path: Path) -> None:
        from transformers import AutoTokenizer
        from vllm.benchmarks.datasets import get_samples

        args = self.parsed(tmp_path)
        samples = get_samples(args, AutoTokenizer.from_pretrained(MODEL))
        assert [sample.prompt for sample in samples] == WORKLOAD.texts
        assert {sample.expected_output_len for sample in samples} == {8}


class TestLoads:
    def test_inf_stands_for_the_concurrencies(self) -> None:
        assert parse_loads("1,4", "inf") == [Load(1), Load(4)]
        assert parse_loads("1,4", "0.5") == [Load(request_rate=0.5)]
        assert [load.label for load in parse_loads("2,2", "inf,0.5,2")] == [
            "2 at a time",
            "0.5 per second",
            "2 per second",
        ]

    @pytest.mark.parametrize(
        ("concurrency", "rate", "flag"),
        [
            ("0", "inf", "--max-concurrency"),
            ("1,x", "inf", "--max-concurrency"),
            ("1", "-1", "--request-rate"),
            ("1", "nan", "--request-rate"),
            ("1", "", "--request-rate"),
        ],
    )
    def test_what_is_no_load_is_refused(
        self, concurrency: str, rate: str, flag: str
    ) -> None:
        with pytest.raises(AdaDecodeError, match=rf"^{flag}: .* Write for example"):
            parse_loads(concurrency, rate)

    def test_too_few_prompts_are_refused(self) -> None:
        check_prompts(4, [Load(4), Load(request_rate=2)])
        with pytest.raises(AdaDecodeError, match=r"^--num-prompts: 4 .* at least 8"):
            check_prompts(4, [Load(1), Load(8)])
