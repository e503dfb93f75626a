# syntax=docker/dockerfile:1
#
#   docker build -t plumb .                        for any x86-64 machine; kernels are chosen when it starts
#   docker build -t plumb:cuda --target cuda .     for NVIDIA GPUs too, with driver 580 or later
#   docker build -t plumb:train --target train .   that, and training in several processes over MPI
#
#   docker run --rm -p 50051:50051 -p 9000:9000 -v plumb-data:/data plumb --model-id org/reward-model

ARG RUST=1.95
ARG CUDA=13.0.2

# ---- building for the CPU ----
FROM rust:${RUST}-bookworm AS rust
RUN cargo install cargo-chef --version '^0.1' --locked
WORKDIR /src

FROM rust AS plan
COPY . .
RUN cargo chef prepare --recipe-path /recipe.json

FROM rust AS build-cpu
COPY --from=plan /recipe.json /recipe.json
# The dependencies: a layer that stays until Cargo.lock or a Cargo.toml changes.
RUN cargo chef cook --release --locked --recipe-path /recipe.json
COPY . .
RUN cargo build --release --locked --bins

# ---- building for CUDA ----
FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04 AS build-cuda
ENV PATH=/usr/local/cargo/bin:$PATH CARGO_HOME=/usr/local/cargo RUSTUP_HOME=/usr/local/rustup
COPY --from=rust /usr/local/cargo /usr/local/cargo
COPY --from=rust /usr/local/rustup /usr/local/rustup
WORKDIR /src
COPY --from=plan /recipe.json /recipe.json
RUN cargo chef cook --release --locked --features plumb-server/cuda,plumb-trainer/cuda --recipe-path /recipe.json
COPY . .
RUN cargo build --release --locked --bins --features plumb-server/cuda,plumb-trainer/cuda

# ---- the CUDA image ----
FROM nvidia/cuda:${CUDA}-runtime-ubuntu24.04 AS cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin plumb \
    && install -d -o plumb -g plumb /data
COPY --from=build-cuda /src/target/release/plumb-server /src/target/release/plumb /src/target/release/plumb-train /usr/local/bin/
# A container is reached from outside; what is downloaded outlives it, and what is compiled for GPUs newer than Hopper.
ENV PLUMB_HOSTNAME=0.0.0.0 HF_HOME=/data/huggingface CUDA_CACHE_PATH=/data/cuda
VOLUME /data
WORKDIR /data
USER 10001
EXPOSE 50051 9000
# The server as a whole: a service whose kind of model is not loaded may be NOT_SERVING. Loading may take minutes.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["plumb", "--timeout-secs", "4", "health"]
ENTRYPOINT ["plumb-server"]

# ---- the image for training in several processes ----
FROM build-cuda AS build-train
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libopenmpi-dev libclang-dev
RUN cargo build --release --locked --bin plumb-train --features plumb-trainer/cuda,plumb-trainer/mpi

FROM cuda AS train
USER 0
# Processes on other machines are started over ssh, by the image's user and without a capability, so not on port 22.
# The MPI Operator brings the keys, and mounts them with modes of its own.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends openmpi-bin openssh-client openssh-server \
    && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_* \
    && usermod --shell /bin/sh plumb \
    && printf '%s\n' 'Port 2222' 'HostKey /home/plumb/.ssh/id_rsa' 'PidFile none' 'StrictModes no' \
        'PasswordAuthentication no' > /etc/ssh/plumb_sshd_config \
    && printf '%s\n' 'Host *' 'Port 2222' 'StrictHostKeyChecking no' 'UserKnownHostsFile /dev/null' \
        'LogLevel ERROR' > /etc/ssh/ssh_config.d/plumb.conf
COPY --from=build-train /src/target/release/plumb-train /usr/local/bin/
USER 10001
ENTRYPOINT ["plumb-train"]
HEALTHCHECK NONE

# ---- the CPU image; the last, so that it is the default ----
FROM debian:bookworm-slim AS cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home --shell /usr/sbin/nologin plumb \
    && install -d -o plumb -g plumb /data
COPY --from=build-cpu /src/target/release/plumb-server /src/target/release/plumb /src/target/release/plumb-train /usr/local/bin/
ENV PLUMB_HOSTNAME=0.0.0.0 HF_HOME=/data/huggingface
VOLUME /data
WORKDIR /data
USER 10001
EXPOSE 50051 9000
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["plumb", "--timeout-secs", "4", "health"]
ENTRYPOINT ["plumb-server"]
