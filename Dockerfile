# Images that serve a model: `docker build --target cpu --build-arg GIT_COMMIT=$(git rev-parse --short=12 HEAD) -t text-generation .`,
# or `--target cuda`, `--target sagemaker`.
#
#   docker run -p 8080:80 -v "$PWD/data:/data" text-generation --model-id M --quantize gptq
#
# Build arguments:
#   BASE              what every stage stands on: a Debian or Ubuntu with Python 3.11 to 3.13 in its packages
#   TORCH_INDEX_URL   another index for torch in the `cpu` target: with the one of torch's CPU-only wheels the image has about
#                     1.5 GB; the default index has the CUDA build, which computes on CPUs too, and makes it 5.3 GB
#   GIT_COMMIT        what the programs say they are built from
#   SOURCE            for the label org.opencontainers.image.source: where whoever builds this keeps the sources
#
# What changes seldom and takes long comes first: packages of the system and of Python are layers of their own, and a change of the
# sources makes none of them anew.

ARG BASE=debian:bookworm-slim

FROM ${BASE} AS python
ARG BASE
RUN command -v apt-get >/dev/null \
    || { echo "error: BASE=$BASE has no apt-get; name a Debian or Ubuntu whose packages have Python 3.11 to 3.13" >&2; exit 1; }
# Python first: a base that has no fit one is told so before anything large is fetched.
RUN export DEBIAN_FRONTEND=noninteractive \
    && apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends python3 python3-venv >/dev/null \
    && { python3 -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' \
        || { echo "error: BASE=$BASE has $(python3 --version); expected Python 3.11 to 3.13: name a newer Debian or Ubuntu" >&2; exit 1; }; } \
    && python3 -m venv /pip

# What is shipped of others: no compiler, no package manager of Python or Rust -------------------------------------------

FROM ${BASE} AS packages
# The mount, here already, makes a builder that works at several stages at a time judge the base first.
RUN --mount=type=bind,from=python,source=/pip,target=/mnt \
    apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        ca-certificates libstdc++6 python3 >/dev/null \
    && rm -rf /var/lib/apt/lists/* \
    # Ubuntu's public image has a user of that number.
    && if other=$(getent passwd 1000); then userdel --remove "${other%%:*}"; fi \
    && useradd --uid 1000 --user-group --create-home text-generation \
    && install -d -o text-generation -g text-generation /data
# Of the sources only the files that decide what is installed.
COPY server/pyproject.toml server/requirements.lock /opt/text-generation/share/packages/
ARG TORCH_INDEX_URL=
RUN --mount=type=bind,from=python,source=/pip,target=/mnt \
    cd /opt/text-generation \
    && python3 -c 'import tomllib; print(*tomllib.load(open("share/packages/pyproject.toml", "rb"))["project"]["dependencies"], sep="\n")' > /tmp/needed \
    && grep -v '^-' share/packages/requirements.lock > /tmp/constraints \
    && python3 -m venv --without-pip . \
    && install() { /mnt/bin/python -m pip --python /opt/text-generation/bin/python install -q --no-cache-dir "$@"; } \
    && install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep '^torch==' /tmp/constraints)" \
    && install -c /tmp/constraints -r /tmp/needed \
    && rm /tmp/needed /tmp/constraints

# What is ours: programs, kernels, the wheel --------------------------------------------------------------------------------

FROM python AS build
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends build-essential ca-certificates curl >/dev/null
WORKDIR /build
COPY rust-toolchain.toml ./
COPY scripts/common.sh scripts/rust.sh scripts/
RUN scripts/rust.sh
ENV PATH=/root/.cargo/bin:$PATH
COPY server/requirements.lock server/
RUN python3 -m venv /opt/text-generation \
    && /opt/text-generation/bin/pip install -q --no-cache-dir $(grep -E '^(setuptools|grpcio-tools)==' server/requirements.lock)
COPY . .
ARG GIT_COMMIT=
# The caches keep what was compiled before: libraries of others. Our own sources are compiled in any case: cargo goes by the times of
# files, and those of another clone may be younger than these.
RUN --mount=type=cache,target=/root/.cargo/registry --mount=type=cache,target=/build/target \
    find launcher router benchmark proto -type f -exec touch {} + \
    && cargo build --locked --release --quiet -p text-generation-launcher -p text-generation-router -p text-generation-benchmark \
    && mkdir -p /programs \
    && for name in launcher router benchmark; do strip -o /programs/text-generation-$name target/release/text-generation-$name; done \
    && python3 scripts/notices.py > server/THIRD_PARTY_NOTICES
# Into a folder of its own, under the paths that it has beside the packages.
RUN TEXT_GENERATION_BINARIES=/programs /opt/text-generation/bin/pip wheel -q --no-deps --no-build-isolation --wheel-dir /dist ./server \
    && /opt/text-generation/bin/pip install -q --no-deps --prefix /own /dist/*.whl

FROM packages AS kernels
COPY --from=build /own /opt/text-generation
# For every architecture that is served: compiled here, by the compiler that comes with torch, not at first use.
RUN /opt/text-generation/bin/text-generation-server compile-kernels --kernel-cache /kernels >/dev/null && chmod -R a+rX /kernels

# What is shipped ---------------------------------------------------------------------------------------------------------

FROM packages AS runtime
COPY --from=build /own /opt/text-generation
ENV PATH=/opt/text-generation/bin:$PATH \
    HF_HOME=/data \
    HUGGINGFACE_HUB_CACHE=/data \
    PORT=80 \
    PYTHONDONTWRITEBYTECODE=1
VOLUME /data
# Ready, or still getting ready; the first minutes of a large model are its start.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m \
    CMD ["python3", "-c", "import http.client as h, os, sys; c = h.HTTPConnection('127.0.0.1', int(os.environ['PORT']), timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
STOPSIGNAL SIGTERM
WORKDIR /data
ENTRYPOINT ["text-generation-launcher"]
ARG BASE
ARG VERSION=0.1.0
ARG SOURCE=
ARG GIT_COMMIT=
LABEL org.opencontainers.image.title="text-generation" \
    org.opencontainers.image.description="Serves language models, quantized ones above all" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${GIT_COMMIT}" \
    org.opencontainers.image.source="${SOURCE}" \
    org.opencontainers.image.base.name="${BASE}"
USER text-generation

FROM runtime AS cuda
# Whoever the container's user is reads them there.
COPY --from=kernels /kernels /opt/text-generation/kernels
ENV DEVICE=cuda \
    KERNEL_CACHE=/opt/text-generation/kernels \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 80

FROM runtime AS sagemaker
COPY deploy/entrypoint-sagemaker.sh /usr/local/bin/
ENV PORT=8080
EXPOSE 8080
ENTRYPOINT ["entrypoint-sagemaker.sh"]

# The last one is what `docker build` makes without a target.
FROM runtime AS cpu
EXPOSE 80
