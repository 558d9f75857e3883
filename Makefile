# What a new user runs: make study, make lab, make test. Each sets up .venv where it is missing.
PYTHON ?= python3
BIN := .venv/bin
export FCSE_RUNS ?= $(CURDIR)/runs
export TOKENIZERS_PARALLELISM := false

.PHONY: study lab app test clean

study: .venv/ready
	$(BIN)/fcse study

lab: .venv/ready
	$(BIN)/jupyter lab notebooks

app: .venv/ready
	$(BIN)/voila notebooks/app_ablation.ipynb

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/test_browser.py
	$(BIN)/pytest -n 2 tests/test_browser.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --nbval notebooks

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv runs
