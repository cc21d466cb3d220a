# The images of openpangu-sft. Built by `make image`; docs/image.md says what may be replaced, and how to build offline.
#
#   npu   (default) the pinned Ascend stack, for training on NPUs
#   cpu   the portable engine and every other stage, on a plain base
#
# Nothing here is fetched by a name that can move: bases by digest once `make lock-base` has run, packages and Python's
# source by sha256, upstream sources by commit.
ARG BASE=docker.io/library/python:3.9-slim-bookworm

FROM ${BASE} AS base

# CPython of the wanted minor version: the base's own, or built from source.
FROM base AS python
# What the image will have beside its base grows below /tree, so that its directories too can be made the same for all.
RUN mkdir -p /tree/opt/openpangu /tree/cache && ln -s /tree/opt/openpangu /opt/openpangu
ARG PYTHON_VERSION=3.9.10
ARG PYTHON_URL=https://www.python.org/ftp/python/3.9.10/Python-3.9.10.tar.xz
ARG PYTHON_SHA256=0a8fbfb5287ebc3a13e9baf3d54e08fa06778ffeccf6311aef821bb3a6586cc8
COPY scripts/image/python.sh /build/scripts/image/
RUN /build/scripts/image/python.sh

# Everything that is installed, with hashes.
FROM python AS dependencies
ARG PYPI_INDEX=https://pypi.org/simple
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG TORCH=cpu
WORKDIR /build
COPY scripts/image/fetch_uv.py scripts/image/install.sh scripts/image/normalise.sh scripts/image/
COPY locks locks

FROM dependencies AS cpu-dependencies
RUN --mount=type=secret,id=ca TARGET=cpu scripts/image/install.sh && scripts/image/normalise.sh 0 /tree

# What this commit adds: its code, and what describes the image.
FROM cpu-dependencies AS cpu-assembled
ARG COMMIT=unknown
ARG SOURCE_DATE_EPOCH=0
COPY . /build/tree/opt/openpangu/app
RUN cd tree/opt/openpangu && mv app/scripts/image/entrypoint.sh entrypoint \
    && /opt/openpangu/venv/bin/python app/scripts/image/describe.py cpu "$COMMIT" . \
    && /build/scripts/image/normalise.sh "$SOURCE_DATE_EPOCH" /build/tree

FROM scratch AS cpu-tree
COPY --from=cpu-dependencies /tree/ /
COPY --from=cpu-assembled /build/tree/ /

FROM base AS cpu
ARG COMMIT=unknown
ARG VERSION=unknown
LABEL org.opencontainers.image.title="openpangu-sft cpu" \
      org.opencontainers.image.description="Fine-tuning of openPangu-Embedded: every stage, on a machine without an NPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.version="${VERSION}"
COPY --from=cpu-tree / /
ENV PATH=/opt/openpangu/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /cache
ENTRYPOINT ["/opt/openpangu/entrypoint"]
CMD ["openpangu-sft", "--help"]
