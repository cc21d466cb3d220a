# The images of openpangu-sft. Built by `make image`; see docs/image.md for build arguments and offline builds.
#
#   npu   (default) the pinned Ascend stack with MindSpeed-LLM, for training on NPUs
#   cpu   the portable engine and every other stage, on a standard Python base
#
# All inputs are pinned: bases by digest once `make lock-base` has run, packages and Python's source by sha256, upstream
# sources by commit. The base's package manager is not used.
ARG BASE=quay.io/ascend/cann:8.0.rc3.beta1-910b-ubuntu22.04-py3.10
ARG CPU_BASE=docker.io/library/python:3.9-slim-bookworm
# Provides compilers and headers, which the bases lack. The image gets only the compiled files and the libraries of the
# compiled Python. Its C library must not be newer than the base's: build.sh compares them.
ARG BUILD_BASE=docker.io/library/buildpack-deps:jammy
# Source of CPython 3.9: base (its own) or source (compiled)
ARG PYTHON_FROM=source
ARG CPU_PYTHON_FROM=base

FROM ${BASE} AS npu-base
FROM ${CPU_BASE} AS cpu-base
FROM ${BUILD_BASE} AS build-base

# Everything an image adds to its base is assembled below /tree, so that directories are reproducible too.
FROM build-base AS python-source
ARG PYTHON_VERSION=3.9.10
ARG PYTHON_URL=https://www.python.org/ftp/python/3.9.10/Python-3.9.10.tar.xz
ARG PYTHON_SHA256=0a8fbfb5287ebc3a13e9baf3d54e08fa06778ffeccf6311aef821bb3a6586cc8
COPY scripts/image/python_source.sh /build/
RUN --mount=type=secret,id=ca /build/python_source.sh /tree/opt/openpangu/python

FROM npu-base AS npu-python-base
COPY scripts/image/python_base.sh /build/
RUN /build/python_base.sh /tree/opt/openpangu/python

FROM cpu-base AS cpu-python-base
COPY scripts/image/python_base.sh /build/
RUN /build/python_base.sh /tree/opt/openpangu/python

FROM python-source AS npu-python-source
FROM python-source AS cpu-python-source
# hadolint ignore=DL3006
FROM npu-python-${PYTHON_FROM} AS npu-python
# hadolint ignore=DL3006
FROM cpu-python-${CPU_PYTHON_FROM} AS cpu-python

# Installed packages, pinned by hash.
FROM npu-base AS npu-dependencies
COPY --from=npu-python /tree/ /tree/
ARG PYPI_INDEX=https://pypi.org/simple
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=cpu
WORKDIR /build
COPY scripts/image/install.sh scripts/image/normalise.py ./
COPY locks locks
RUN --mount=type=secret,id=ca --mount=type=cache,target=/root/.cache \
    ./install.sh npu && /opt/openpangu/venv/bin/python normalise.py 0 /tree

FROM cpu-base AS cpu-dependencies
COPY --from=cpu-python /tree/ /tree/
ARG PYPI_INDEX=https://pypi.org/simple
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=cpu
WORKDIR /build
COPY scripts/image/install.sh scripts/image/normalise.py ./
COPY locks locks
RUN --mount=type=secret,id=ca --mount=type=cache,target=/root/.cache \
    ./install.sh cpu && /opt/openpangu/venv/bin/python normalise.py 0 /tree

# MindSpeed-LLM and its dependencies from `make sources`, with the helper that Megatron-LM would compile at the start of
# training: the image's code is read-only, and the image has no compiler.
FROM build-base AS helpers
COPY .sources /sources
COPY scripts/image/helpers.sh /build/
RUN --mount=type=bind,from=npu-dependencies,target=/base /build/helpers.sh /sources /base

FROM npu-dependencies AS upstream
COPY --from=helpers /sources /upstream/opt/openpangu/app/.sources
RUN PYTHONPATH=/upstream/opt/openpangu/app/.sources/mindspeed-llm/megatron/core/datasets \
    /opt/openpangu/venv/bin/python -c 'import helpers' && /opt/openpangu/venv/bin/python normalise.py 0 /upstream

# This commit's code, and the description of the image.
FROM scratch AS app
COPY LICENSE pyproject.toml /opt/openpangu/app/
COPY examples /opt/openpangu/app/examples
COPY patches /opt/openpangu/app/patches
COPY recipes /opt/openpangu/app/recipes
COPY src /opt/openpangu/app/src
COPY scripts/image/become_user.py /opt/openpangu/
COPY scripts/image/entrypoint.sh /opt/openpangu/entrypoint

FROM npu-dependencies AS npu-described
COPY --from=upstream /upstream/opt/openpangu/app/.sources/manifest.json /build/sources.json
COPY --from=app / /made
COPY scripts/image/sbom.sh scripts/image/describe.py ./
ARG COMMIT=unknown
ARG BASE
ARG SOURCE_DATE_EPOCH=0
RUN --mount=type=secret,id=ca ./sbom.sh npu "$COMMIT" "$BASE" /made/opt/openpangu \
    && /opt/openpangu/venv/bin/python normalise.py "$SOURCE_DATE_EPOCH" /made

FROM cpu-dependencies AS cpu-described
COPY --from=app / /made
COPY scripts/image/sbom.sh scripts/image/describe.py ./
ARG COMMIT=unknown
ARG CPU_BASE
ARG SOURCE_DATE_EPOCH=0
RUN --mount=type=secret,id=ca ./sbom.sh cpu "$COMMIT" "$CPU_BASE" /made/opt/openpangu \
    && /opt/openpangu/venv/bin/python normalise.py "$SOURCE_DATE_EPOCH" /made

FROM cpu-base AS cpu
COPY --from=cpu-dependencies /tree/ /
COPY --from=cpu-described /made/ /
ENV PATH=/opt/openpangu/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
ENTRYPOINT ["/opt/openpangu/entrypoint"]
CMD ["openpangu-sft", "--help"]
ARG COMMIT=unknown
ARG VERSION=unknown
ARG STACK=unknown
ARG CPU_BASE
LABEL org.opencontainers.image.title="openpangu-sft cpu" \
      org.opencontainers.image.description="Fine-tuning of openPangu-Embedded: every stage, on a machine without an NPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.base.name="${CPU_BASE}" \
      openpangu-sft.stack="${STACK}"

FROM npu-base AS npu
COPY --from=npu-dependencies /tree/ /
COPY --from=upstream /upstream/ /
COPY --from=npu-described /made/ /
ENV PATH=/opt/openpangu/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
ENTRYPOINT ["/opt/openpangu/entrypoint"]
CMD ["openpangu-sft", "--help"]
ARG COMMIT=unknown
ARG VERSION=unknown
ARG STACK=unknown
ARG BASE
LABEL org.opencontainers.image.title="openpangu-sft npu" \
      org.opencontainers.image.description="Fine-tuning of openPangu-Embedded on Ascend NPUs: MindSpeed-LLM 1.0.0, patched" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.base.name="${BASE}" \
      openpangu-sft.stack="${STACK}"
