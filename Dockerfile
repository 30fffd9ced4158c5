# FactScope as a container: the dashboard on port 8501, run by a user without rights.
#
#   docker build -t factscope:0.1.0 .
#   docker run --rm -p 127.0.0.1:8501:8501 factscope:0.1.0
#
# BASE       a Python image on Debian. In production name it by digest (python:3.11-slim@sha256:...), so that a build
#            gives the same image tomorrow.
# PIP_ARGS_TORCH
#            further arguments of pip for torch alone, to choose its build: the index of the CPU wheels makes an image
#            of about 2 GB; the default wheel brings CUDA (about 8 GB) and needs the NVIDIA runtime on the host.
#            docker build --build-arg TORCH_VARIANT=cpu --build-arg PIP_ARGS_TORCH="..." -t factscope:0.1.0 .
# TORCH_VARIANT
#            cpu or cuda: checked against what was installed, so that no image is the other one by mistake.
#
# Build with `--format docker` where the builder makes OCI images (buildah, podman): OCI has no HEALTHCHECK.
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
ARG PIP_ARGS_TORCH=""
ARG TORCH_VARIANT=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/factscope
ENV PATH=/opt/factscope/bin:$PATH
COPY requirements.txt /build/
# torch in a layer of its own: the largest one, and the one that changes least.
RUN pip install ${PIP_ARGS_TORCH} "$(sed -n 's/ *#.*//; /^torch==/p' /build/requirements.txt)" \
    && python -c "import sys, torch; wanted = '${TORCH_VARIANT}'; found = 'cuda' if torch.version.cuda else 'cpu'; sys.exit(0 if wanted in ('', found) else f'TORCH_VARIANT={wanted}, but pip installed the {found} build of torch: set PIP_ARGS_TORCH')"
RUN pip install -r /build/requirements.txt
COPY . /build/
RUN pip install --no-deps /build

FROM ${BASE}
LABEL org.opencontainers.image.title="FactScope" org.opencontainers.image.licenses="Apache-2.0"
# Latin, Chinese, Japanese and Korean letters in figures that are saved as pictures.
RUN apt-get update \
    && apt-get install -y --no-install-recommends fonts-dejavu-core fonts-noto-cjk \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin factscope \
    && install -d -o factscope -g factscope /models /work
COPY --from=build /opt/factscope /opt/factscope
ENV PATH=/opt/factscope/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/models \
    FACTSCOPE_MODELS_ALLOWED=bundled
USER 10001
WORKDIR /work
VOLUME /models
EXPOSE 8501
# The page answers as soon as the bundled model is loaded; a large one of your own may need a longer start period.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import sys, urllib.request; sys.exit(urllib.request.urlopen('http://127.0.0.1:8501/_stcore/health', timeout=4).read() != b'ok')"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "factscope", "serve", "--address", "0.0.0.0", "--port", "8501"]
