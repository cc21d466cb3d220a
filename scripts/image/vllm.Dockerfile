# vLLM on NPUs as openPangu's vendor describes it in inference/vllm_ascend_for_openpangu_embedded_7b.md: the image of
# vllm-ascend, newer versions over it, and over those the vendor's files, which have the parsers. The context is the folder of
# openPangu-Embedded-7B, which brings them; see docs/serving.md.
ARG BASE=quay.io/ascend/vllm-ascend:v0.9.1-dev
# hadolint ignore=DL3006
FROM ${BASE}
ARG PYPI_INDEX=https://pypi.org/simple
ARG SOURCE=https://files.pythonhosted.org/packages/40/ea/61433a41e891f2c310c407190b417db179535b6e2501b4b11b2f59dec7d7/vllm_ascend-0.9.2rc1.tar.gz
ARG SOURCE_SHA256=223e76ea3742cf46300a6159cb7a8333fa98078d18fbe65378a742ebe9826296
# VLLM_TARGET_DEVICE=empty: aarch64 has no wheel, and the source is not to be compiled for CUDA
RUN VLLM_TARGET_DEVICE=empty pip install --no-cache-dir --no-deps --index-url "$PYPI_INDEX" vllm==0.9.2 pybase64==1.4.1 \
    && curl -fsSL -o /tmp/vllm-ascend.tar.gz "$SOURCE" \
    && test "$(sha256sum </tmp/vllm-ascend.tar.gz)" = "$SOURCE_SHA256  -" \
    && mkdir -p /vllm-workspace/vllm-ascend \
    && tar -xzf /tmp/vllm-ascend.tar.gz -C /vllm-workspace/vllm-ascend --strip-components=1 \
    && rm /tmp/vllm-ascend.tar.gz
COPY inference/vllm_ascend/ /vllm-workspace/vllm-ascend/vllm_ascend/
ENV PYTHONPATH=/vllm-workspace/vllm-ascend:${PYTHONPATH} VLLM_USE_V1=1
