# syntax=docker/dockerfile:1
#
# The worker's image.
#   VARIANT  cpu (default) or cuda: which build of torch
#   MODEL    a known name or hub id to bake in (default smollm2-135m), or none: then mount one at /models
#
#   docker build --tag apiary .
#   docker run --rm --publish 50051:50051 apiary
#   docker run --rm --publish 50051:50051 --volume ./my-llama:/models/my-llama:ro apiary \
#       serve --listen 0.0.0.0:50051 --insecure --model /models/my-llama
#   docker build --build-arg VARIANT=cuda --tag apiary:cuda .
#   docker run --rm --gpus all --env APIARY_DEVICE=cuda --publish 50051:50051 apiary:cuda

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
WORKDIR /src
# for the kernels of the CPU backend; any version will do
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/apiary
# torch in a layer of its own: it is large and seldom changes
ARG VARIANT=cpu
COPY pyproject.toml ./
RUN case "$VARIANT" in \
        cpu) export PIP_INDEX_URL=https://download.pytorch.org/whl/cpu ;; \
        cuda) ;; \
        *) echo "VARIANT is cpu or cuda, not '$VARIANT'" >&2; exit 2 ;; \
    esac \
    && /opt/apiary/bin/python -c 'import tomllib; extra = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["server"]; print(*(need for need in extra if need.startswith("torch")))' > /tmp/torch.txt \
    && /opt/apiary/bin/python -m pip install --requirement /tmp/torch.txt
COPY README.md LICENSE hatch_build.py ./
COPY buzz buzz
COPY proto proto
COPY server server
COPY client client
COPY benchmarks benchmarks
RUN /opt/apiary/bin/python -m pip install '.[server]'

FROM build AS model
ARG MODEL=smollm2-135m
ENV APIARY_CACHE_DIR=/models HF_HOME=/models/huggingface
RUN mkdir /models \
    && if [ "$MODEL" != none ]; then /opt/apiary/bin/apiary models pull "$MODEL"; fi

FROM python:${PYTHON}-slim
ARG MODEL=smollm2-135m
LABEL org.opencontainers.image.title="apiary" \
      org.opencontainers.image.description="gRPC inference with a bounded, sparse (BUZZ) KV cache for every chat session" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/apiary /opt/apiary
COPY --from=model /models /models
ENV PATH=/opt/apiary/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    APIARY_MODEL=$MODEL \
    APIARY_CACHE_DIR=/models \
    HF_HOME=/models/huggingface \
    HF_HUB_OFFLINE=1 \
    APIARY_LOG_FORMAT=json
USER 10001:10001
WORKDIR /tmp
EXPOSE 50051
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import grpc; from grpc_health.v1 import health_pb2 as h, health_pb2_grpc as s; answer = s.HealthStub(grpc.insecure_channel('127.0.0.1:50051')).Check(h.HealthCheckRequest(), timeout=3); raise SystemExit(answer.status != h.HealthCheckResponse.SERVING)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["apiary"]
CMD ["serve", "--listen", "0.0.0.0:50051", "--insecure"]
