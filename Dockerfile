# wholegrad on the CPU:                docker build -t wholegrad .
# with PyTorch for NVIDIA's GPUs:      docker build -t wholegrad:cuda --build-arg TORCH=cu130 .
#
# docker run --rm -v "$PWD:/data" wholegrad segment slides/a.svs --out masks
# docker run --rm -v "$PWD:/data" --gpus all wholegrad:cuda train run.toml --device cuda
#
# What it writes belongs to the user of the image, number 1000; with --user "$(id -u):$(id -g)" to you.

ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# Which of PyTorch's builds: cpu, or a CUDA version as pytorch.org names them (cu128, cu130).
ARG TORCH=cpu

COPY pyproject.toml constraints.txt README.md LICENSE /opt/wholegrad/
COPY src /opt/wholegrad/src

WORKDIR /opt/wholegrad
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m pip install --extra-index-url https://download.pytorch.org/whl/${TORCH} -c constraints.txt .

# Nothing runs as root. Compiled kernels are kept in /cache, which is a volume so that they outlast a container.
RUN useradd --create-home --user-group --uid 1000 wholegrad \
    && mkdir -p /data /cache \
    && chown wholegrad:wholegrad /data /cache \
    && chmod 1777 /cache
ENV WHOLEGRAD_CACHE=/cache
VOLUME /cache
USER 1000
WORKDIR /data
RUN wholegrad doctor --quick

HEALTHCHECK --interval=5m --timeout=60s --start-period=30s --retries=2 CMD ["wholegrad", "doctor", "--quick"]
ENTRYPOINT ["wholegrad"]
CMD ["--help"]
