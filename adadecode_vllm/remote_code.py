# SPDX-License-Identifier: Apache-2.0
"""Models that bring program code of their own: it runs only if the user says so.

Left without an answer, Transformers would ask on the terminal.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from adadecode_vllm.errors import AdaDecodeError

FLAG = "--trust-remote-code"

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        FLAG, help="Run program code that comes with the model. Read it before."
    ),
]


@contextmanager
def only_trusted_code(argument: str) -> Iterator[None]:
    """Turn Transformers' refusal to run a model's code into a sentence.

    Args:
        argument: The option or argument that named the model, with its value.

    Raises:
        AdaDecodeError: The model needs code of its own, and nobody has allowed that.
    """
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise AdaDecodeError(
            f"{argument}: the model brings program code of its own, which would run on "
            f"this machine; read it and pass {FLAG}, or give a model that needs none"
        ) from error
