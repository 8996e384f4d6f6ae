# The tools, their Python packages and Caffe 1.0, for an ordinary user:
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" rebirth-caffe tools/rebirth_net.py in.prototxt

FROM debian:bookworm-slim AS setup
RUN apt-get update \
    && apt-get install -y --no-install-recommends make mmdebstrap python3-venv \
    && rm -rf /var/lib/apt/lists/*
# Only what the set-up itself reads, so that a change elsewhere does not repeat the downloads.
WORKDIR /opt/rebirth
COPY Makefile requirements.txt ./
COPY tools/install_caffe.sh tools/
RUN make .venv/requirements.stamp .caffe/installed.stamp
COPY . .
# Compiled here, because the user who runs the tools cannot write beside them.
RUN .venv/bin/python -m compileall -q rebirth_caffe

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home rebirth \
    && install -d -o rebirth -g rebirth /work
COPY --from=setup /opt/rebirth /opt/rebirth
# Home is where any user given with --user can write.
ENV HOME=/tmp PATH=/opt/rebirth/.venv/bin:/opt/rebirth/.caffe/bin:/usr/local/bin:/usr/bin:/bin
USER rebirth
WORKDIR /work
ENTRYPOINT ["/opt/rebirth/tools/image_entry.sh"]
