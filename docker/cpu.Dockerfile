# dicode serve on a CPU, with the bundled models:  docker build -f docker/cpu.Dockerfile -t dicode .
FROM python:3.11-slim
WORKDIR /opt/dicode
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY dicode dicode
RUN pip install --no-cache-dir -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu '.[serve]' \
    && useradd --create-home dicode && mkdir /data && chown dicode /data
USER dicode
VOLUME /data
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=5)"]
# any address but this machine's own needs a key: docker run -e DICODE_API_KEY=…
CMD ["dicode", "serve", "--host", "0.0.0.0", "--data-folder", "/data"]
