# SPDX-License-Identifier: Apache-2.0
"""The schema of a heads directory's `config.json`, and its reading."""

import json
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    model_validator,
)

from adadecode_vllm import __version__
from adadecode_vllm.errors import AdaDecodeError, problems
from adadecode_vllm.heads.files import (
    CONFIG_FILE,
    DRAFT_TOKENS,
    StoredTensors,
    config_path,
    heads_error,
    memory_name,
    open_tensors,
    tensor_name,
)

HeadsDtype = Literal["float32", "bfloat16", "float16"]

MODEL_TYPE: Final = "adadecode"
_SAFETENSORS_DTYPE = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class ExitCalibration(BaseModel):
    """How an exit's confidence relates to the acceptance of its predictions.

    ``P(accepted) = sigmoid(slope * log_odds + intercept)``, where `log_odds` is
    log(p / (1 - p)) of the head's top probability p.

    Attributes:
        slope: Not negative, so that the map is monotone.
        intercept: Log-odds of acceptance at p = 1/2.
        tokens: Held-out tokens that it was fitted on.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    slope: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    intercept: Annotated[float, Field(allow_inf_nan=False)]
    tokens: PositiveInt

    def probability_threshold(self, threshold: float) -> float:
        """Where the head's probability must lie for an acceptance above `threshold`.

        Args:
            threshold: In [0, 1].

        Returns:
            The equivalent threshold on the head's top probability, in [0, 1].
        """
        if threshold in (0.0, 1.0):
            return threshold
        wanted = math.log(threshold / (1 - threshold)) - self.intercept
        if self.slope == 0:
            return 0.0 if wanted < 0 else 1.0
        return 0.5 * (1 + math.tanh(0.5 * wanted / self.slope))


class ExitHeadsConfig(BaseModel):
    """What `config.json` of a heads directory says.

    Attributes:
        model_type: Always `adadecode`.
        exit_layers: Layer counts of the exits, strictly increasing, each in
            [0, num_hidden_layers - 1]; an exit at l reads the output of layers[0:l],
            that at 0 the token's embedding as it enters the first layer.
        hidden_size: d of the base model.
        vocab_size: Rows of the base model's LM head.
        num_hidden_layers: Decoder layers of the base model.
        base_model: Name or path of the base model; opened only where heads are served
            by their own name.
        lm_head_fingerprint: See `adadecode_vllm.heads.fingerprint`.
        library_version: Version of adadecode-vllm that wrote the directory.
        dtype: Dtype of the stored weights.
        calibration: By exit layer (as a string, JSON has no other keys); None for heads
            that were not calibrated.
        draft_vocabulary: Number of token ids in the tensor `draft_token_ids`, the most
            frequent tokens of the training text; None for heads without it.
        memory: Whether every exit has a matrix U for the state of the token before.
        base_model_revision: Branch, tag or commit of a base model on the Hub; None for
            its main branch.
        recommended: Options of the engine that suit these heads, used where they are
            served by their own name; None for the defaults.
        speculators_config: The heads described in the form of the `speculators`
            project, for tools that read it; nothing here does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model_type: Literal["adadecode"] = MODEL_TYPE
    exit_layers: Annotated[list[int], Field(min_length=1)]
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    num_hidden_layers: Annotated[int, Field(ge=2)]
    base_model: str
    lm_head_fingerprint: Annotated[
        str, Field(pattern=r"^sim64x16:[0-9a-f]{16}(-[0-9a-f]{16}){15}$")
    ]
    library_version: str = __version__
    dtype: HeadsDtype = "float32"
    calibration: dict[str, ExitCalibration] | None = None
    draft_vocabulary: PositiveInt | None = None
    memory: bool = False
    base_model_revision: str | None = None
    recommended: dict[str, Any] | None = None
    speculators_config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_exit_layers(self) -> "ExitHeadsConfig":
        """Exit layers must increase and lie strictly inside the model."""
        if problem := exit_layers_problem(self.exit_layers, self.num_hidden_layers):
            raise ValueError(f"exit_layers {problem}")
        return self

    @model_validator(mode="after")
    def _check_calibration(self) -> "ExitHeadsConfig":
        """Every exit is calibrated, or none."""
        names = [str(layer) for layer in self.exit_layers]
        if self.calibration is not None and sorted(self.calibration) != sorted(names):
            raise ValueError(
                f"calibration names the exits {', '.join(self.calibration)} instead of "
                f"{', '.join(names)}"
            )
        return self

    @model_validator(mode="after")
    def _check_draft_vocabulary(self) -> "ExitHeadsConfig":
        """The draft vocabulary is a part of the vocabulary."""
        if (self.draft_vocabulary or 0) > self.vocab_size:
            raise ValueError(
                f"draft_vocabulary is {self.draft_vocabulary}, but the vocabulary has "
                f"only {self.vocab_size} tokens"
            )
        return self

    def thresholds(
        self, gate: str, threshold: float, exit_layers: Sequence[int] | None = None
    ) -> list[float]:
        """Thresholds on exits' probabilities that a gate amounts to.

        Args:
            gate: `probability` or `acceptance`.
            threshold: What the probability, or that of acceptance, must exceed; in
                [0, 1].
            exit_layers: Some of `exit_layers`; None for all.

        Returns:
            One for each of these exits.

        Raises:
            AdaDecodeError: If the gate needs calibrated heads and these are not.
        """
        layers = self.exit_layers if exit_layers is None else exit_layers
        if gate == "probability":
            return [threshold] * len(layers)
        if self.calibration is None:
            raise AdaDecodeError(
                "--adadecode-config: gate = 'acceptance' is refused, because the heads "
                "are not calibrated. Train them with `adadecode train` and a held-out "
                "share, or use the gate 'probability'."
            )
        return [
            self.calibration[str(layer)].probability_threshold(threshold)
            for layer in layers
        ]

    def calibrations(
        self, exit_layers: Sequence[int]
    ) -> list[tuple[float, float]] | None:
        """Slope and intercept of exits' acceptance over their log-odds.

        Args:
            exit_layers: Some of `exit_layers`.

        Returns:
            One pair for each; None for heads that were not calibrated.
        """
        if self.calibration is None:
            return None
        chosen = [self.calibration[str(layer)] for layer in exit_layers]
        return [(exit_.slope, exit_.intercept) for exit_ in chosen]

    @property
    def stored_tensors(self) -> StoredTensors:
        """What `model.safetensors` beside this configuration must hold."""
        weight = (self.hidden_size, self.hidden_size), _SAFETENSORS_DTYPE[self.dtype]
        names = [tensor_name, memory_name] if self.memory else [tensor_name]
        stored: StoredTensors = {
            name(layer): weight for layer in self.exit_layers for name in names
        }
        if self.draft_vocabulary is not None:
            stored[DRAFT_TOKENS] = ((self.draft_vocabulary,), "I64")
        return stored

    @property
    def default_draft_vocabulary(self) -> int:
        """Tokens that gates look at unless told otherwise; 0 for all.

        A ranking of nearly the whole vocabulary would save little and can miss a token.
        """
        return default_draft_vocabulary(self.draft_vocabulary or 0, self.vocab_size)

    def guess_threshold(self, layer: int) -> float:
        """When an exit's top token is worth verifying though the gate is not sure.

        A front token that stops at its last exit is verified anyway. One more row for
        its guess brings a token if it is right, and costs the layers up to that exit,
        which no other row of the request needs: it pays where the probability of being
        right exceeds their share of the model.

        Args:
            layer: The exit's layer count, one of `exit_layers`.

        Returns:
            The probability of the exit's top token to exceed, in [0, 1].
        """
        # Before the first layer only the row costs; take it for a layer's work.
        share = max(layer, 1) / self.num_hidden_layers
        if self.calibration is None:
            return share
        return self.calibration[str(layer)].probability_threshold(share)


def parse_heads_dtype(flag: str, text: str) -> HeadsDtype:
    """Check the dtype that heads are to be stored in.

    Args:
        flag: That it was given with.
        text: What was given.

    Returns:
        The same.

    Raises:
        AdaDecodeError: Heads are not stored in it.
    """
    if text not in get_args(HeadsDtype):
        raise AdaDecodeError(
            f"{flag} {text}: unknown dtype; choose one of "
            f"{', '.join(get_args(HeadsDtype))}"
        )
    return cast(HeadsDtype, text)


def default_draft_vocabulary(ranked: int, vocab_size: int) -> int:
    """Tokens that gates look at by default, of so many that are ranked; 0 for all.

    A gate that knew a single token would always be sure of it.
    """
    return ranked if 2 <= ranked <= vocab_size // 2 else 0


def exit_layers_problem(layers: list[int], num_hidden_layers: int) -> str | None:
    """Say what is wrong with a list of exit layers.

    Args:
        layers: Layer counts of the exits.
        num_hidden_layers: Decoder layers of the base model.

    Returns:
        The end of a sentence that begins with the name of the list, or None when the
        list is valid.
    """
    if not layers:
        return "is empty"
    if num_hidden_layers < 2:
        return "has no use: the model has one layer, and nothing can be left out"
    last = num_hidden_layers - 1
    if outside := [layer for layer in layers if not 0 <= layer <= last]:
        return (
            f"contains {outside[0]}, but the model's {num_hidden_layers} layers allow "
            f"0 to {last}"
        )
    if sorted(set(layers)) != layers:
        return f"must be strictly increasing, not {layers}"
    return None


def load_heads_config(directory: str | PathLike[str]) -> ExitHeadsConfig:
    """Read and check a heads directory, all but the values of the weights.

    Args:
        directory: A local directory.

    Returns:
        The configuration. `model.safetensors` is there and its header agrees with it.

    Raises:
        AdaDecodeError: The directory cannot be used; the message names the flag, the
            reason and the remedy.
    """
    config = read_config(directory)
    with open_tensors(Path(directory), config.stored_tensors):
        return config


def read_config(directory: str | PathLike[str]) -> ExitHeadsConfig:
    """Read `config.json` of a local heads directory, and nothing else.

    Returns:
        The configuration.

    Raises:
        AdaDecodeError: It cannot be read or is not that of exit heads.
    """
    directory = Path(directory)
    return _parse(directory, _read_json(directory))


def _read_json(directory: Path) -> dict[str, Any]:
    """Read `config.json` as a dictionary."""
    path = config_path(directory)
    remedy = "save the heads again"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise heads_error(
            directory,
            f"{CONFIG_FILE} cannot be read ({error.strerror})",
            "check the file and its permissions",
        ) from error
    except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8
        raise heads_error(
            directory, f"{CONFIG_FILE} is not JSON ({error})", remedy
        ) from error
    if not isinstance(values, dict):
        raise heads_error(directory, f"{CONFIG_FILE} is not a JSON object", remedy)
    return values


def _parse(directory: Path, values: dict[str, Any]) -> ExitHeadsConfig:
    """Validate the dictionary, with sentences instead of pydantic's report."""
    found = values.get("model_type")
    if found != MODEL_TYPE:
        raise heads_error(
            directory,
            f"{CONFIG_FILE} has model_type {found!r} instead of {MODEL_TYPE!r}",
            "give a directory of exit heads, not of a model",
        )
    try:
        return ExitHeadsConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(directory, values, error) from error


def _explain(
    directory: Path, values: dict[str, Any], error: ValidationError
) -> AdaDecodeError:
    """Turn pydantic's report into one sentence."""
    unknown = [
        detail["loc"][0]
        for detail in error.errors(include_url=False)
        if detail["type"] == "extra_forbidden"
    ]
    if unknown:
        names = ", ".join(repr(name) for name in unknown)
        return heads_error(
            directory,
            f"{CONFIG_FILE} has the unknown key {names} (written by adadecode-vllm "
            f"{values.get('library_version', 'of unknown version')}, this is "
            f"{__version__})",
            "install the version that wrote it, or remove the key",
        )
    return heads_error(
        directory,
        f"{CONFIG_FILE} is invalid: {', '.join(problems(error))}",
        "correct the file or save the heads again",
    )
