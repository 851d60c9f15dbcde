# The router beside llama.cpp's own server.
#   docker build -t llama-router .                                                      for NVIDIA GPUs
#   docker build -t llama-router --build-arg BASE=ghcr.io/ggml-org/llama.cpp:server .   for the CPU
ARG BASE=ghcr.io/ggml-org/llama.cpp:server-cuda
FROM ${BASE}

# Ubuntu keeps no old versions that could be pinned
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv util-linux \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/llama-router

WORKDIR /src
COPY pyproject.toml README.md LICENSE run.py ./
COPY router router
RUN /opt/llama-router/bin/pip install --no-cache-dir '.[docker]' && rm -rf /src/*

# Neither router nor engines need to be root; the volume takes over who owns its folder
RUN mkdir -p /models /app/models /var/lib/llama-router && chown 10001:10001 /var/lib/llama-router
WORKDIR /models
ENV LLAMA_SERVER_PATH=/app/llama-server \
    LLAMA_ROUTER__API__HOST=0.0.0.0 \
    LLAMA_ROUTER_STATE_DIR=/var/lib/llama-router \
    HF_HOME=/var/lib/llama-router/huggingface
# Also what is pulled outlives the container
VOLUME /var/lib/llama-router
EXPOSE 8000
# The base image probes its own port
HEALTHCHECK --start-period=10s CMD ["curl", "-fsS", "http://127.0.0.1:8000/ready"]
STOPSIGNAL SIGTERM
USER 10001
# An earlier router's containers have their configuration beside llama-server
ENTRYPOINT ["/bin/sh", "-c", "[ ! -f /app/config.json ] || cd /app; exec /opt/llama-router/bin/llama-router \"$@\"", "llama-router"]
CMD ["--models-dir", "/models", "--models-dir", "/app/models"]
