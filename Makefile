# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# The pins keep a plain index from resolving to CUDA builds of several gigabytes.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export OMP_NUM_THREADS ?= 1
# Test processes beside one another, each with pools of ranks of its own.
WORKERS ?= 2

.PHONY: demo test test-slow test-gpu test-cluster lint types format clean

.venv/.installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) -e ".[dev,slurm]"
	@touch $@

demo: .venv/.installed
	$(BIN)/dist-stability demo --out out/demo

test: .venv/.installed
	@# Many hundred processes import the package; some environments keep Python from caching what it compiles.
	@$(BIN)/python -m compileall -q dist_stability
	$(BIN)/python -m pytest -m "not slow and not cluster" -n $(WORKERS) --dist worksteal --durations=40

test-slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

test-gpu: .venv/.installed
	$(BIN)/python -m pytest -m gpu

test-cluster: .venv/.installed
	$(BIN)/python -m pytest tests/cluster -m cluster

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist out *.egg-info
