# syntax=docker/dockerfile:1
# The image of every pod. Two targets, for linux/amd64:
#
#   docker build --target cuda -t registry.example/manta .
#   docker build --target cpu -t localhost/manta:cpu .
#
# Everything that is installed is named by its hash: see requirements/README.md.

# Debian 12 with Python 3.11. The digest of the tag that you trust belongs behind it: python:3.11-slim-bookworm@sha256:…
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# pip compiles what it installs: in the pods nobody could write the byte code, and every process would compile anew.
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/manta
ENV PATH=/opt/manta/bin:$PATH
COPY requirements/build.txt /requirements/
RUN pip install --require-hashes --only-binary :all: --requirement /requirements/build.txt

# The code, as a wheel: the image has no source tree. It is installed apart, as a layer of its own: a new version of it
# is 22 MB to push and pull, not the packages again.
FROM build AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY cluster cluster
COPY experts_service experts_service
COPY gateway gateway
COPY router_service router_service
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .
RUN pip install --no-deps --no-index --root /installed /wheels/*.whl

# xgrammar asks for Triton on every Linux, 691 MB. Without a GPU nothing of it runs.
FROM build AS cpu-environment
COPY requirements/common.txt /requirements/
RUN pip install --require-hashes --only-binary :all: --no-deps --requirement /requirements/common.txt
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements/torch-cpu.txt /requirements/
RUN pip install --require-hashes --only-binary :all: --no-deps --index-url "$TORCH_CPU_INDEX" \
        --requirement /requirements/torch-cpu.txt
RUN ! pip check | grep -v -e '^xgrammar .* requires triton, ' -e '^No broken ' && pip uninstall --yes pip

FROM build AS cuda-environment
COPY requirements/common.txt /requirements/
RUN pip install --require-hashes --only-binary :all: --no-deps --requirement /requirements/common.txt
COPY requirements/torch-cuda.txt /requirements/
RUN pip install --require-hashes --only-binary :all: --no-deps --requirement /requirements/torch-cuda.txt
RUN pip check && pip uninstall --yes pip

# What runs: Python, bash (KubeRay's commands need one) and the environment; nobody in it can write.
FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --gid 10001 manta && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin manta
ENV PATH=/opt/manta/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    MANTA_HOST=0.0.0.0 MANTA_MAKE_API_KEY=1
WORKDIR /home/manta
EXPOSE 8000 9000
STOPSIGNAL SIGTERM
# One machine: `docker run -p 8000:8000 …`. Other machines reach its doors, so there is a key: of a file, MANTA_API_KEY,
# or one that is made and printed. On Kubernetes the pods' own probes count, and KubeRay writes the command.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=6 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
CMD ["manta", "serve"]

FROM runtime AS cpu
COPY --from=cpu-environment /opt/manta /opt/manta
COPY --from=wheel /installed/opt/manta /opt/manta
COPY requirements/sbom.py /usr/local/share/manta/
RUN python /usr/local/share/manta/sbom.py > /usr/local/share/manta/sbom.json
USER 10001:10001

FROM runtime AS cuda
# Triton compiles the kernels of GPUs in the pod, when they are first used, and needs a C compiler for what starts them.
# Debian's packages are signed; the base image's digest does not name them.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=cuda-environment /opt/manta /opt/manta
COPY --from=wheel /installed/opt/manta /opt/manta
COPY requirements/sbom.py /usr/local/share/manta/
RUN python /usr/local/share/manta/sbom.py > /usr/local/share/manta/sbom.json
USER 10001:10001
