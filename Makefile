# `make sweep` and `make test` set up everything they need on a fresh machine.
# Another Python, with nothing installed: make test-gpu PYTHON=python3

VENV := .venv
ifeq ($(origin PYTHON), undefined)
PYTHON := $(VENV)/bin/python
ENVIRONMENT := $(VENV)/.ready
endif
# On a machine with a GPU the peers are measured too.
EXTRAS := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo dev,docs,peers || echo dev,docs)
ARGS ?=
# Tests that measure time, or fork, run one at a time; the others side by side, a thread each. They
# start a hundred processes, which read what the first one has compiled.
ALONE := $(addprefix tests/test_,$(addsuffix .py,cli forks start_up timing))

.PHONY: .venv sweep test browser check docs figures screenshots site test-gpu clean
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

browser:  ## A Chromium for the tests of the report page, by apt-get if there is none.
	.ci/browser

check: $(ENVIRONMENT)  ## Format, lint and strict types.
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

docs: $(ENVIRONMENT)  ## What docs/ and README.md take from the code and from records.
	PYTHONPATH=. $(PYTHON) docs/generate.py

figures: $(ENVIRONMENT)  ## Every figure and table of docs again, from the records in docs/results.
	PYTHONPATH=. $(PYTHON) docs/figures.py

screenshots: $(ENVIRONMENT) browser  ## README's pictures of the report page, after `make figures` changed it.
	$(PYTHON) docs/screenshots.py

site: $(ENVIRONMENT)  ## The documentation as a site, in site/: dead links and anchors fail.
	$(PYTHON) -m zensical build --strict --clean
	$(PYTHON) docs/check_site.py site

test-gpu: $(ENVIRONMENT)  ## The tests that need a GPU. ARGS="-n 8": kernels compile side by side.
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu tests/test_gpu.py
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu --ignore tests/test_gpu.py $(ARGS)
	PYTHONPATH=. $(PYTHON) -m pytest -m "not gpu" $(wildcard tests/test_*conv*.py) tests/test_kernel_chela.py $(wildcard tests/test_kernel_gates*.py) $(ARGS)

.venv: $(VENV)/.ready  ## The environment alone.

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Installing into $(VENV): some minutes, 2.4 GB with torch for the CPU"
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $@

clean:  ## Remove the environment and caches; run folders stay.
	rm -rf $(VENV) .cache site .pytest_cache .mypy_cache .ruff_cache
