# featinv on a CPU: docker build -t featinv . && docker run --rm -v "$PWD:/work" featinv sample
FROM python:3.12-slim

RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN pip install --no-cache-dir "/src[data,evaluate]" /src/packages/tiny && rm -r /src

RUN useradd --create-home featinv
USER featinv
WORKDIR /work
ENV HF_HUB_OFFLINE=1
ENTRYPOINT ["featinv"]
CMD ["--help"]
