# Two commands do everything on a fresh machine: `make demo` and `make test`.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); if [ $$n -gt 4 ]; then echo 4; elif [ $$n -lt 2 ]; then echo 2; else echo $$n; fi)
SELECT ?= -m "not slow"
COVERAGE ?=

.PHONY: help install runtimes demo test test-all lint types tests clean

help:  ## show this text
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 found; install one, or run: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# In KiB. Torch brings CUDA's libraries; 6 GB in all, beside which pip unpacks 3 GB of wheels.
ROOM := 9500000
LITTLE_ROOM := an environment takes up to 6 GB, and 3 GB of TMPDIR (else /tmp) while pip installs

$(VENV)/.installed: $(BIN)/python pyproject.toml $(wildcard obc_deploy/native/*.[ch]pp runtimes/sparse/*.[ch]pp runtimes/sparse/*/*.hpp)
	@test -e $@ || df -Pk . "$${TMPDIR:-/tmp}" | awk 'NR > 1 && $$4 < $(ROOM) && !seen[$$6]++ { \
	printf "note: %.1f GB are free on %s; %s\n", $$4 / 1e6, $$6, "$(LITTLE_ROOM)" }' >&2
	$(BIN)/python -m pip install -qq --editable '.[demo,dev]'
	@touch $@

install: $(VENV)/.installed  ## the environment .venv with the package and its extras

# DeepSparse needs Python 3.8 to 3.11 and packages of its own; without it everything else still works.
$(VENV)/.runtimes: $(VENV)/.installed
	@if $(BIN)/obc-deploy runtimes install deepsparse; then touch $@; else \
	echo "note: going on without DeepSparse; its rows and tests are left out" >&2; fi

# Builds engines ahead of time, without a GPU; there are builds of it for Linux on x86-64 alone. Its
# packages are installed by name: the extra itself would compile ours again.
RTX_PACKAGES = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["tensorrt-rtx"], sep="\n")

$(VENV)/.tensorrt-rtx: $(VENV)/.installed
	@if test "$$(uname -sm)" = "Linux x86_64" && $(BIN)/python -c '$(RTX_PACKAGES)' > $@.txt \
	&& $(BIN)/python -m pip install -qq -r $@.txt; then touch $@; else \
	echo "note: going on without TensorRT-RTX; its dry runs are left out" >&2; fi

runtimes: $(VENV)/.runtimes  ## the runtimes that live in environments of their own

demo: $(VENV)/.runtimes  ## compress, export, run and measure an embedded network
	$(BIN)/obc-deploy demo

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy -p obc_deploy

# One thread a worker: threads that share cores wait for each other.
tests: $(VENV)/.runtimes $(VENV)/.tensorrt-rtx
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SELECT) -n $(WORKERS) --dist loadfile $(COVERAGE) --durations=20

test: lint types tests  ## lint, types and tests; all but the slow ones

test-all:  ## the same with coverage and the slow tests: wheels, whole networks, real images
	$(MAKE) test SELECT= COVERAGE='--cov --cov-report=term'

clean:  ## remove the environment and what builds and tests left
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
