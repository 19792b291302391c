# SPDX-License-Identifier: Apache-2.0
"""What the Hugging Face Hub refuses, in sentences."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from adadecode_vllm.errors import AdaDecodeError, first_line


@contextmanager
def explained(
    make_error: Callable[[str, str], AdaDecodeError], revision: str | None
) -> Iterator[None]:
    """Turn whatever the Hub's client raises into one sentence.

    Not narrower than Exception: the errors of the HTTP client below huggingface_hub are
    no OSErrors, and it is another client in every major version. Hence nothing but
    calls to huggingface_hub belongs inside.
    """
    try:
        yield
    except Exception as error:
        raise make_error(*_explain(error, revision)) from error


def _explain(error: Exception, revision: str | None) -> tuple[str, str]:
    """Say what the Hub's refusal means, and what to do: reason and remedy."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    log_in = "log in with `hf auth login` or pass a token that may do this"
    if isinstance(error, GatedRepoError):  # a RepositoryNotFoundError as well
        return (
            "the repository is gated and this account has no access",
            f"ask for access on its page, then {log_in}",
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            "neither a local directory nor a repository that the Hugging Face Hub "
            "shows to this account",
            f"check the name, or {log_in}",
        )
    if isinstance(error, RevisionNotFoundError):
        return (
            f"the repository has no revision {revision!r}",
            "name a branch, tag or commit that it has",
        )
    if isinstance(error, LocalEntryNotFoundError):
        cause = error.__cause__
        hub = f"does not answer ({first_line(cause)})" if cause else "was not asked"
        return (
            f"neither a local directory nor downloaded before, and the Hugging Face "
            f"Hub {hub}",
            "check the path, or the name and the connection",
        )
    if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
        return f"the Hugging Face Hub refused access ({first_line(error)})", log_in
    return (
        f"the Hugging Face Hub gave an error ({first_line(error)})",
        "check the connection and try again",
    )
