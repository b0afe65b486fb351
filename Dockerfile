# FastBLT with the shipped checkpoint:
#   docker build -t fastblt . && docker run --rm -p 8000:8000 fastblt
#   docker build -t fastblt:cuda --build-arg VARIANT=cuda . && docker run --rm --gpus all -p 8000:8000 fastblt:cuda
# Arguments go to `fastblt serve`. Another checkpoint is mounted (`-v /path/to/it:/model:ro fastblt /model`), or baked:
# an image of two lines, `FROM fastblt` and `COPY it /model`, with `CMD ["/model"]`.
# pip's own variables choose where packages, and so CPU or CUDA builds of torch, come from:
#   docker build --build-arg PIP_INDEX_URL=... --build-arg PIP_EXTRA_INDEX_URL=... --build-arg PIP_FIND_LINKS=... .
ARG VARIANT=cpu

FROM python:3.11-slim AS build
ARG VARIANT
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/fastblt
ENV PATH=/opt/fastblt/bin:$PATH
WORKDIR /source
# Dependencies change less often than the source: they have a layer of their own.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > /tmp/requirements.txt \
    && pip install --requirement /tmp/requirements.txt
# The build of torch decides what the image can run on, and is gigabytes larger with CUDA.
RUN python -c "import sys, torch; found = 'cuda' if torch.version.cuda else 'cpu'; found == sys.argv[1] or \
      sys.exit(f'the build of torch is for {found}, not {sys.argv[1]}: choose another index, or VARIANT={found}')" $VARIANT
COPY LICENSE README.md ./
COPY src src
COPY kernels kernels
COPY models models
COPY server server
COPY benchmarks benchmarks
COPY deploy deploy
RUN pip install --no-deps .

FROM python:3.11-slim AS runtime
# The CPU's kernels and Triton's launchers are compiled on the machine they run on.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 fastblt
COPY --from=build /opt/fastblt /opt/fastblt
ENV PATH=/opt/fastblt/bin:$PATH PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
# By number: Kubernetes refuses to take a name's word for it that it is not root's.
USER 10001:10001
WORKDIR /home/fastblt
ENV HOME=/home/fastblt
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fastblt", "serve", "--host", "0.0.0.0", "--port", "8000"]

FROM runtime AS cpu

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENV FASTBLT_SERVE_DEVICE=cuda FASTBLT_SERVE_DTYPE=bfloat16

FROM ${VARIANT}
