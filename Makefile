# make demo    write a story with the model that comes along (the first run sets everything up)
# make serve   run the daemon in the foreground
# make test    all checks of .ci/run: ruff, mypy, pytest in two processes
# make test-fast    the tests that start no daemon, without the slowest: 90 s on two idle cores
# make check FILE=path    ruff, mypy and the tests that belong to one source file
# make docs    write docs/cli.md anew from the commands' help
# make test-aarch64    kernels, formats and shared memory on an emulated Raspberry Pi 5 (x86-64 only)
# make families    compare all model families with transformers and llama.cpp (installs the former)
# make lint    ruff and mypy only
# make clean   remove caches and build products; the environment .venv stays

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

BIN := .venv/bin
READY := .venv/.installed
# The newest interpreter that works; a pyenv shim may stand on PATH without one behind it.
PYTHONS := python3.13 python3.12 python3.11 python3
PYTHON_OK := import sys; sys.exit(sys.version_info < (3, 11))

# Two processes suit two cores; more need cores for the daemons that tests start.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: help demo serve test test-fast check docs test-aarch64 families lint kernels clean

help:
	@sed -n 's/^# make /make /p' Makefile

demo: $(READY)
	@$(BIN)/sterna generate "Once upon a time" --echo --temperature 0.7 --max-tokens 200
	@echo
	@echo "That was the small story model; it writes no plot. Go on with:"
	@echo "  $(CURDIR)/$(BIN)/sterna serve /path/to/model.gguf"
	@echo "or put the command on PATH of this shell: . $(CURDIR)/$(BIN)/activate; then: sterna --help"

serve: $(READY)
	@$(BIN)/sterna serve

test: $(READY)
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target lint kernels
	$(PYTEST) -m "not slow and not bench"

test-fast: $(READY)
	$(PYTEST) -m "not slow and not bench and not daemon and not long"

check: $(READY)
	@test -n "$(FILE)" || { echo "usage: make check FILE=runtime/config.py" >&2; exit 64; }
	@$(BIN)/python .ci/check.py "$(FILE)"

docs: $(READY)
	$(BIN)/python docs/write_cli.py

# Compiled once, beside lint: two test processes would each compile what both need.
kernels: $(READY)
	$(BIN)/sterna warm

test-aarch64: $(READY)
	@PYTHON=$(BIN)/python tests/aarch64/run.sh

# llama_cpp comes from llama-cpp-python; LLAMA_CPP_LIB_PATH may name a folder with libllama.so of your own.
families: $(READY)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 'transformers>=5.20'
	$(BIN)/python -m pytest -s -m "bench or slow" tests/families

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

# Both ways end in the same environment; uv is faster where it is at hand.
$(READY): pyproject.toml
	@if [ ! -x $(BIN)/python ]; then \
	  if command -v uv >/dev/null; then \
	    uv venv --quiet --python '>=3.11,<3.14' .venv; \
	  else \
	    python=; \
	    for each in $(PYTHONS); do \
	      if "$$each" -c '$(PYTHON_OK)' 2>/dev/null; then python=$$each; break; fi; \
	    done; \
	    if [ -z "$$python" ]; then \
	      found=$$(python3 -V 2>/dev/null || echo 'no python3'); \
	      echo "Sterna needs Python 3.11 or newer; PATH has $$found." >&2; \
	      exit 1; \
	    fi; \
	    "$$python" -m venv .venv; \
	  fi; \
	fi
	@echo "Installing Sterna and its development tools into .venv ..."
	@if command -v uv >/dev/null; then \
	  uv pip install --quiet --python $(BIN)/python -e '.[dev]'; \
	else \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[dev]'; \
	fi
	@touch $@
