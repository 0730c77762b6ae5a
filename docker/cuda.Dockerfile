# dicode serve on NVIDIA GPUs:  docker build -f docker/cuda.Dockerfile -t dicode .  and  docker run --gpus all …
# PyPI's torch of constraints.txt is built for CUDA 13. For an older driver, another build of the same version:
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu126 …
FROM python:3.11-slim
ARG TORCH_INDEX=https://pypi.org/simple
WORKDIR /opt/dicode
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY dicode dicode
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url "$TORCH_INDEX" '.[serve]' \
    && useradd --create-home dicode && mkdir /data && chown dicode /data
USER dicode
VOLUME /data
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
# any address but this machine's own needs a key: docker run -e DICODE_API_KEY=…
CMD ["dicode", "serve", "--host", "0.0.0.0", "--data-folder", "/data", "--device", "cuda"]
