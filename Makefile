# `make sweep` and `make test` set up everything they need on a fresh machine.
# Another Python, with nothing installed: make test-gpu PYTHON=python3

VENV := .venv
ifeq ($(origin PYTHON), undefined)
PYTHON := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.ready
endif
# On a machine with a GPU the peers are measured too.
EXTRAS := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo dev,peers || echo dev)
ARGS ?=
# Tests that measure time, or fork, run one at a time; the others side by side, a thread each. They
# start a hundred processes, which read what the first one has compiled.
ALONE := $(addprefix tests/test_,$(addsuffix .py,cli forks start_up timing))

.PHONY: .venv sweep test check docs test-gpu clean
.DEFAULT_GOAL := help

help:  ## Show this.
	@grep -E '^[a-z.-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

sweep: $(ENVIRONMENT)  ## The main job: measure everything that can run here. ARGS="--lens 1k..4k" adds flags.
	PYTHONPATH=. $(PYTHON) -m chela_bench sweep $(ARGS)

test: export OMP_NUM_THREADS := 1
test: export PYTHONDONTWRITEBYTECODE :=
test: $(ENVIRONMENT)  ## The tests that need no GPU.
	PYTHONPATH=. $(PYTHON) -m pytest -m "not gpu" -n 2 --dist worksteal $(ALONE:%=--ignore %) $(ARGS)
	PYTHONPATH=. $(PYTHON) -m pytest -m "not gpu" $(ALONE) $(ARGS)

check: $(ENVIRONMENT)  ## Format, lint and strict types.
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

docs: $(ENVIRONMENT)  ## The pages that the code itself knows: records, bench.toml, command line.
	PYTHONPATH=. $(PYTHON) docs/generate.py

test-gpu: $(ENVIRONMENT)  ## The tests that need a GPU. ARGS="-n 8": kernels compile side by side.
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests/test_gpu.py
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu --ignore tests/test_gpu.py $(ARGS)
	PYTHONPATH=. $(PYTHON) -m pytest -m "not gpu" $(wildcard tests/test_*conv*.py) tests/test_kernel_chela.py tests/test_kernel_gates.py $(ARGS)

.venv: $(VENV)/.ready  ## The environment alone.

$(VENV)/.ready: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

clean:  ## Remove the environment and caches; run folders stay.
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
