# What a new user runs: make study, make lab, make test; between two edits: make check.
# Each sets up .venv where it is missing.
PYTHON ?= python3
BIN := .venv/bin
export FCSE_RUNS ?= $(CURDIR)/runs
export TOKENIZERS_PARALLELISM := false

.PHONY: study lab app check test federated clean

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

# What takes minutes comes first, so that neither of the two processes ends long after the other; of
# the notebooks first the two that train most and not at all, so that none waits for another's runs.
FILES := $(sort $(wildcard notebooks/*.ipynb tests/test_*.py))
SLOW := $(filter notebooks/06% notebooks/07%,$(FILES)) $(filter notebooks/%,$(FILES)) \
	$(patsubst %,tests/test_%.py,browser methods_learn grid notebooks evaluation training_panel hub)

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --nbval $(SLOW) $(filter-out $(SLOW),$(FILES))

# A server and two clients as processes. Flower's pins do not go with ours: an environment of its own.
federated: .venv/ready .venv-federated/ready
	$(BIN)/pytest tests/test_federation.py

.venv-federated/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-federated
	grep -v -E '^(certifi|packaging|rich|typer)==' constraints.txt > .venv-federated/constraints.txt
	.venv-federated/bin/python -m pip install --constraint .venv-federated/constraints.txt --editable . flwr==1.42.0
	touch $@

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv .venv-federated runs
