# make test         what to run before each commit: check, unit, integration and most of system
# make check        format, lint, types, import contracts, generated files, and that all tests can be collected
#
# The tiers of the tests; .ci/run runs make test, load, slow and ops. How long each takes is in tests/README.md.
# make unit         no server, no connection, nothing slow
# make integration  one part against a real nats-server, or over real sockets
# make system       whole adapters as processes, also what takes long
# make ops          chart, image's files, alerts, console in a browser, clients of others; skips what cannot be installed
# make slow         what `make test` leaves out of these three, since it takes seconds or minutes of work
# make long         what neither has: outages in their real length, minutes of waiting each, all at once
# make load         chaos, attacks and load, each in its short form
#
# make image-test   the image, built and run: needs root and Debian, and installs buildah and podman
# make alerts-test  every alert, fired by a real fault in a real Prometheus
# make console-test the console in a headless Chromium; pictures in .pytest_cache/console/
# make bench        what the bridge costs, beside one that promises nothing
# make chaos        a quarter of an hour in which everything goes wrong, and a table of what came of it
# make soak         half an hour of steady traffic: nothing may grow; a table and a plot
# make attacks      what one sandbox can do to another, attack by attack: a table
# make fuzz         foreign bytes into every reader, guided by coverage, for FUZZ_S seconds each; installs the fuzzer
# make audit        known vulnerabilities in what is locked; needs an index that has advisories
#
# make demo         a conversation on this machine: server, simulated WeChat, adapter and an agent that echoes;
#                   AGENT='program arguments' answers instead
# make format       the code as `make check` wants it
# make generate     schemas/, helm/nats/ and the table of settings, from the code
# make dashboard-picture  helm/dashboard.png, from what a real Prometheus answers under load
# make dist         what a release consists of, into dist/release/; see docs/howto/release.md
# make docs         the documentation as a site in dist/docs, all links checked
# make npm          what some tests take from npm, into tests/npm/
# make clean        everything that make and the tests have made
#
# Needs git, make and Python 3.11 or newer. The rest is installed into this directory (.tools/, .venv/).

SHELL := /bin/sh
.SUFFIXES:
MAKEFLAGS += --no-print-directory
# Each of the many processes that tests and bench start would compile for a second what none of them may keep.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NPM := tests/npm
NPM_STAMP := $(NPM)/node_modules/.installed
# An environment that is there is kept, whichever Python it has. The last one is the newest, not yet among the tested.
PYTHONS := $(BIN)/python python3 python3.14 python3.13 python3.12 python3.11 python3.15

.PHONY: test check types lint contracts generated tests-collect unit integration system ops load slow long image-test alerts-test console-test bench chaos soak attacks fuzz \
  audit demo format generate dashboard-picture docs docs-tools dist npm clean install
.DEFAULT_GOAL := test

demo: install
	@exec $(BIN)/wechat-nats demo $${AGENT:+--exec "$$AGENT"}

# Tests at a time: more than a small machine has cores, since most tests wait for processes and timers.
JOBS := 12
pytest = $(BIN)/pytest -n $(JOBS) --dist worksteal

# `check` has run the one that is left out.
test: check
	@$(pytest) -m '(unit or integration or system) and not (slow or long)' --ignore tests/test_docs.py </dev/null

unit: install
	@$(BIN)/pytest -n 2 --dist worksteal -m 'unit and not slow' </dev/null

integration: install
	@$(pytest) -m integration </dev/null

system: install
	@$(pytest) --timeout 600 -m 'system and not long' </dev/null

ops: install
	@$(BIN)/pytest -n 2 --dist loadfile --timeout 900 -m ops </dev/null

# What `make test` leaves out of its tiers, without what mostly waits.
slow: install
	@$(BIN)/pytest -n 4 --dist worksteal --timeout 900 -m '(unit or integration or system) and slow and not long' </dev/null
	@SCHEDULES=500 $(BIN)/pytest -n 2 tests/test_schedules.py tests/test_schedules_inbound.py </dev/null

long: install
	@$(BIN)/pytest -n 10 --timeout 1200 -m long </dev/null

load: install
	@$(BIN)/pytest -n 3 --dist worksteal --timeout 900 -m load </dev/null

# 15 minutes in all. SEED, MODE (cursor_replay, or ack_on_delivery: iLink forgets what it has delivered).
chaos: install
	@$(BIN)/python -m tests.e2e.chaos --minutes 15 --bots 500 --seed $(or $(SEED),1) --mode $(or $(MODE),cursor_replay)

# SOAK_MINUTES, SEED. Less than about 20 minutes judge nothing that is kept by its age.
soak: install
	@$(BIN)/python -m tests.e2e.soak --minutes $(or $(SOAK_MINUTES),30) --seed $(or $(SEED),1)

# ATTACKS: some of them by name; ATTACK_S: seconds of each; SEED.
attacks: install
	@$(BIN)/python -m tests.attacks --seconds $(or $(ATTACK_S),15) --seed $(or $(SEED),1) $(ATTACKS)

bench: install
	@$(BIN)/python -m tests.bench

image-test: install
	@$(BIN)/pytest --timeout 900 tests/image/checks.py --durations=0 --durations-min=1 </dev/null

# Where uv is: `make install` puts it into .tools if there is none on the PATH.
dashboard-picture: install
	@.ci/need prometheus promtool || true
	@export PATH="$$PATH:$$PWD/.tools/bin"; \
	uv run --quiet --isolated --frozen --all-extras --group picture --python $(BIN)/python \
	  python -m tests.monitoring.picture helm/dashboard.png

alerts-test: install
	@.ci/need promtool prometheus prometheus-alertmanager || true
	@$(BIN)/pytest -s --timeout 900 tests/monitoring </dev/null

# Two at a time, of which `types` takes longest in a fresh checkout.
check: install
	@$(MAKE) -j 2 types lint contracts generated tests-collect

types: install
	@$(BIN)/mypy
	@$(BIN)/mypy schemas/examples/python/*.py

lint: install
	@found=$$($(BIN)/ruff format --check . 2>&1) || { echo "$$found" >&2; echo 'run: make format' >&2; exit 1; }
	@$(BIN)/ruff check --quiet .

contracts: install
	@found=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$found" >&2; exit 1; }

generated: install
	@$(BIN)/python -m tests.generate --check
	@$(BIN)/python -m tests.bus.roles --check
	@found=$$($(BIN)/pytest -q -p no:cacheprovider tests/test_docs.py </dev/null 2>&1) || { echo "$$found" >&2; exit 1; }

# All tests can be collected; what this compiles, none of the workers of a run compiles again.
tests-collect: install
	@found=$$($(BIN)/pytest --collect-only -qq -p no:cacheprovider </dev/null 2>&1) || { echo "$$found" >&2; exit 1; }

format: install
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

TYPES := schemas/examples/typescript/wechat-nats.d.ts
generate: install
	@$(BIN)/python -m tests.generate
	@$(BIN)/python -m tests.bus.roles
	@if command -v npm >/dev/null 2>&1; then \
	  $(MAKE) npm && node $(NPM)/types.mjs schemas >$(NPM)/node_modules/.types && \
	  mv $(NPM)/node_modules/.types $(TYPES); \
	else echo 'npm is missing: $(TYPES) is left as it is' >&2; fi
	@$(BIN)/python -m tests.chart.generate

# FUZZ_S: seconds for each target; FUZZ: some of them.
FUZZ_S := 60
FUZZ :=
fuzz: install
	@$(call environment,fuzz)
	@.tools/fuzz/bin/python -m tests.fuzz --seconds $(FUZZ_S) $(FUZZ)

docs: docs-tools
	@found=$$(NO_MKDOCS_2_WARNING=1 .tools/docs/bin/mkdocs build --clean 2>&1) || { echo "$$found" >&2; exit 1; }
	@echo 'dist/docs/index.html'

docs-tools: install
	@$(call environment,docs)

# AUDIT=--unknown-ok: no failure where nobody with advisories answers.
AUDIT :=
audit: install
	@$(call environment,audit)
	@.tools/audit/bin/python -m tests.audit $(AUDIT) "$$(command -v uv || echo .tools/bin/uv)"

# An environment of its own for a group of pyproject.toml, so that the tests' has only what they need.
environment = exec </dev/null 1>&2; uv=$$(command -v uv || echo .tools/bin/uv); \
	UV_PROJECT_ENVIRONMENT='.tools/$(1)' "$$uv" sync --quiet --frozen --all-extras --no-default-groups \
	  --group $(1) --group dev --python $(BIN)/python --no-python-downloads

console-test: install
	@$(BIN)/pytest --timeout 900 tests/console/test_browser.py </dev/null

RELEASE := dist/release
# Wheel, source archive, chart, list of packages (SBOM) and checksums; signed by hand.
dist: install
	@rm -rf $(RELEASE) && mkdir -p $(RELEASE)
	@uv=$$(command -v uv || echo .tools/bin/uv); \
	"$$uv" build --quiet --out-dir $(RELEASE) && rm -f $(RELEASE)/.gitignore && \
	"$$uv" export --quiet --frozen --no-dev --all-extras --format cyclonedx1.5 \
	  --output-file $(RELEASE)/sbom.cdx.json >/dev/null
	@$(BIN)/python -c 'from tests.chart.helm import CHART, helm; helm("package", str(CHART), "--destination", "$(RELEASE)")'
	@cd $(RELEASE) && sha256sum -- * >SHA256SUMS && cat SHA256SUMS

npm: $(NPM_STAMP)
	@:

$(NPM_STAMP): $(NPM)/package.json $(NPM)/package-lock.json
	@exec </dev/null 1>&2; set -e; \
	command -v npm >/dev/null 2>&1 || { echo 'npm is missing; on Debian: apt-get install nodejs npm'; exit 1; }; \
	echo 'Installing into $(NPM)/node_modules …'; \
	(cd $(NPM) && npm ci --loglevel=error); \
	touch $@

clean:
	rm -rf $(VENV) $(NPM)/node_modules .tools dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find adapter docs tests -name __pycache__ -type d -prune -exec rm -rf {} +

install: $(STAMP)

# Quiet, on stderr and without stdin: `make demo` may be at the end of a pipe.
$(STAMP): pyproject.toml uv.lock
	@exec </dev/null 1>&2; set -e; \
	python=; \
	for candidate in $(PYTHONS); do \
	  if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python=$$("$$candidate" -c 'import sys; print(getattr(sys, "_base_executable", "") or sys.executable)'); \
	    break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo 'wechat-nats needs Python 3.11 or newer; none of these is one: $(PYTHONS)'; \
	  echo 'Install one (apt-get install python3 python3-venv), or name it: make PYTHONS=/path/to/python3'; exit 1; \
	fi; \
	if command -v uv >/dev/null 2>&1; then uv=uv; else \
	  uv=.tools/bin/uv; \
	  if [ ! -x "$$uv" ]; then \
	    echo 'Installing uv into .tools …'; \
	    if "$$python" -m pip --version >/dev/null 2>&1; then \
	      "$$python" -m venv --without-pip --clear .tools && \
	      "$$python" -m pip --python .tools/bin/python install --quiet --disable-pip-version-check 'uv>=0.9'; \
	    else \
	      "$$python" -m venv --clear .tools && \
	      .tools/bin/python -m pip install --quiet --disable-pip-version-check 'uv>=0.9'; \
	    fi || { \
	      echo "uv could not be installed with $$python, which needs pip or venv for it, and an index that answers."; \
	      echo 'On Debian: apt-get install python3-venv. Or have uv 0.9 or newer on the PATH.'; exit 1; \
	    }; \
	  fi; \
	fi; \
	echo 'Installing the dependencies into $(VENV) …'; \
	UV_PROJECT_ENVIRONMENT='$(VENV)' "$$uv" sync --quiet --frozen --all-extras --python "$$python" \
	  --no-python-downloads; \
	touch $@
