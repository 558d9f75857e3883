# What a new user runs: make study, make lab, make test; between two edits: make check.
# Each sets up .venv where it is missing.
PYTHON ?= python3
BIN := .venv/bin
export FCSE_RUNS ?= $(CURDIR)/runs
export TOKENIZERS_PARALLELISM := false

.PHONY: study lab app check test clean

study: .venv/ready
	$(BIN)/fcse study

# No news pop-up (.jupyter/overrides.json), and nothing is asked of the net: no news, no newer
# versions, no list of extensions.
QUIET := --LabApp.app_settings_dir='$(CURDIR)/.jupyter' --LabApp.news_url=None \
	--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate \
	--LabApp.extension_manager=readonly

lab: .venv/ready
	$(BIN)/jupyter lab notebooks $(QUIET)

app: .venv/ready
	$(BIN)/voila notebooks/app_ablation.ipynb

# Tests of the rooms that need no trained encoder: seconds each.
QUICK := chunked_loss core_tuning findings loss_properties losses method_parts objectives plots \
	readme report rooms setup

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -q -n 2 --dist loadfile $(QUICK:%=tests/test_%.py)

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
