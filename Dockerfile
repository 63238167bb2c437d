# `multiverse serve` as a user without rights. From the root of the repository:
#
#   docker build -t multiverse-serve .
#   docker run -p 127.0.0.1:8000:8000 -v multiverse-cache:/cache -e MULTIVERSE_API_KEY multiverse-serve owner/name
#
# What follows the image's name are options of `multiverse serve`. For a GPU: --build-arg TORCH=auto, and --gpus all.
FROM python:3.11-slim-bookworm

ARG TORCH=cpu
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HOME=/cache

WORKDIR /app
COPY constraints.txt ./
RUN pip install --no-cache-dir uv==0.13.9 \
    && uv pip install --system --no-cache --torch-backend="$TORCH" -c constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY src src
# xgrammar asks for triton, hundreds of megabytes that serve a GPU only; torch for CUDA has brought it already
RUN echo "triton; sys_platform == 'none'" > without.txt \
    && uv pip install --system --no-cache -c constraints.txt --override without.txt '.[serve]' \
    && useradd --create-home --uid 1000 multiverse \
    && install -d -o multiverse -g multiverse /cache

USER 1000:1000
VOLUME /cache
EXPOSE 8000
# 200 while the model is loaded, too; what sends requests should ask /ready
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["multiverse", "serve", "--host", "0.0.0.0", "--port", "8000"]
