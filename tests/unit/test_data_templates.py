# SPDX-License-Identifier: Apache-2.0
"""Prompts of `adadecode data` through a chat template."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from adadecode_vllm.toolkit.data.make import make_data
from adadecode_vllm.toolkit.data.options import DataOptions
from adadecode_vllm.toolkit.data.prompts import load_model, tokenize
from adadecode_vllm.toolkit.data.shards import read_rows
from adadecode_vllm.toolkit.data.tasks import Example
from tests.harness import MODEL

pytestmark = pytest.mark.usefixtures("no_engine")


def test_chat(options: DataOptions) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    make_data(replace(options, chat=None))  # the tokenizer has a template
    row = next(read_rows(options.out))
    expected = "<s>Problem: Ann has 0 apples. \nSteps:\n"
    assert tokenizer.decode(row.prompt_ids) == expected


@pytest.mark.parametrize("shown", ["date_string", "strftime_now('%d %b %Y')"])
def test_a_template_is_told_the_day_of_the_first_run(shown: str) -> None:
    model = load_model(MODEL)
    model.tokenizer.chat_template = f"{{{{ {shown} }}}}: {{{{ messages[0].content }}}}"
    date = datetime(2021, 3, 4, tzinfo=UTC)
    example = Example("text", "", "How many?")
    (found,) = tokenize([example], model, chat=True, finished=False, date=date)
    assert model.tokenizer.decode(found.ids) == "04 Mar 2021: How many?"
