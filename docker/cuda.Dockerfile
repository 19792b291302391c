# SPDX-License-Identifier: Apache-2.0
# vLLM on CUDA with AdaDecode:
#
#   docker build -f docker/cuda.Dockerfile -t adadecode-cuda .
#   docker run --rm --gpus all --ipc host -p 8000:8000 -v "$PWD/heads:/heads" \
#       adadecode-cuda serve MODEL --plugin adadecode --adadecode-heads /heads
FROM python:3.12-slim-bookworm

# Triton and torch.compile need a compiler. CUDA's libraries come with torch's wheels,
# the driver from the host.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY adadecode_vllm adadecode_vllm
COPY patches patches

RUN pip install --no-cache-dir ".[cuda]"

RUN useradd --create-home adadecode
USER adadecode
WORKDIR /home/adadecode
EXPOSE 8000
ENTRYPOINT ["vllm"]
CMD ["serve", "--help"]
