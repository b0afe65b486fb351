# FastBLT with the shipped checkpoint:
#   docker build -t fastblt . && docker run --rm -p 8000:8000 fastblt
# Arguments go to `fastblt serve`; a mounted checkpoint is served by naming its folder.
# pip's own variables choose where packages, and so CPU or CUDA builds of torch, come from:
#   docker build --build-arg PIP_INDEX_URL=... --build-arg PIP_EXTRA_INDEX_URL=... .

FROM python:3.11-slim AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/fastblt
ENV PATH=/opt/fastblt/bin:$PATH
WORKDIR /source
# Dependencies change less often than the source: they have a layer of their own.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > /tmp/requirements.txt \
    && pip install --requirement /tmp/requirements.txt
COPY LICENSE README.md ./
COPY kernels kernels
COPY models models
COPY server server
COPY benchmarks benchmarks
RUN pip install --no-deps .

FROM python:3.11-slim
# The CPU's kernels and Triton's launchers are compiled on the machine they run on.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 fastblt
COPY --from=build /opt/fastblt /opt/fastblt
ENV PATH=/opt/fastblt/bin:$PATH PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive
USER fastblt
WORKDIR /home/fastblt
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=3)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["fastblt", "serve", "--host", "0.0.0.0", "--port", "8000"]
