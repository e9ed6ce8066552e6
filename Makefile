# Two commands matter: `make demo` runs the main job, `make test` runs the tests. Both set everything up.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# Two test files at a time, one thread each: most of a test's time is not spent in matrix products.
TOGETHER = -n 2 --dist loadfile

.PHONY: demo test test-slow test-paper test-unit test-peft bench lint docs clean

demo: $(VENV)/.installed
	$(BIN)/gaintune assets --fetch
	$(BIN)/gaintune demo --run runs/demo

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TOGETHER)

test-slow: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TOGETHER) -m slow

test-paper: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/recipes/test_rehearsal.py -m slow

test-unit: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TOGETHER) -m "not slow and not real_model and not study_data and not cluster"

test-peft: $(VENV)/.installed-dev
	$(BIN)/python tests/peft_contract/run.py

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/run.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e ".[dev]"
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) -e ".[benchmark]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist src/*.egg-info

docs: $(VENV)/.installed-dev
	$(BIN)/python docs/generate.py
