# `make demo` and `make test` do everything on a fresh machine: environment, installation, the job.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo demo-short test lint types docs slow parity benchmarks clean

demo: $(INSTALLED)
	$(BIN)/saefty demo --quiet --out artifacts/demo

demo-short: $(INSTALLED)
	$(BIN)/saefty demo --short --out artifacts/demo-short

test: $(INSTALLED)
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# The pages under docs/reference that are made from the code.
docs: $(INSTALLED)
	$(BIN)/python docs/make_reference.py

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# sae-lens pins other versions than ours, so it lives in an environment of its own.
parity: $(INSTALLED)
	tests/parity/environment.sh
	$(BIN)/python -m pytest -m parity

# The tables of docs/performance.md; on a machine that does nothing else, an hour or two.
BENCHMARKS = training_speed time_to_fvu training_profile families_speed scaling gpu_training \
	extraction_speed context_speed encode_speed analysis_speed query_speed codes_memory memory \
	steering_speed annotate_speed
benchmarks: $(INSTALLED)
	benchmarks/peers.sh
	for job in $(BENCHMARKS); do $(BIN)/python benchmarks/$$job.py --write || exit; done

# torch first and pinned: a range that admits a newer one would fetch gigabytes of CUDA libraries.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) artifacts .pytest_cache .mypy_cache .ruff_cache
