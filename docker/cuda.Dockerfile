# dicode serve on NVIDIA GPUs:  docker build -f docker/cuda.Dockerfile -t dicode .  and  docker run --gpus all …
FROM python:3.11-slim
WORKDIR /opt/dicode
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY dicode dicode
RUN pip install --no-cache-dir -c constraints.txt '.[serve]' \
    && useradd --create-home dicode && mkdir /data && chown dicode /data
USER dicode
VOLUME /data
EXPOSE 8000
# any address but this machine's own needs a key: docker run -e DICODE_API_KEY=…
CMD ["dicode", "serve", "--host", "0.0.0.0", "--data-folder", "/data", "--device", "cuda"]
