# specdec serve on the CPU. Build: docker build -t specdec . Run: docker run -p 8000:8000 -v models:/cache specdec
FROM python:3.11-slim-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
COPY . /specdec
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /specdec

FROM python:3.11-slim-bookworm
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[serve]"
RUN useradd --create-home specdec && install -d -o specdec -g specdec /cache
ENV SPECDEC_CACHE=/cache HF_HOME=/cache/huggingface
USER specdec
WORKDIR /home/specdec
VOLUME /cache
EXPOSE 8000
# The first start downloads the model.
HEALTHCHECK --start-period=10m CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["specdec", "serve", "--host", "0.0.0.0"]
