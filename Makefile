# make demo            a chat answer, the KV cache in codes, the expert cache: on this machine, with a small real model
# make test            the tests (ruff and mypy: make lint; the slow ones: make test-slow)
# make test-native     the C core: 10,000 random shapes and routings, sanitizers, planted bugs (10 minutes)
# make test-upstream   the contracts with transformers, on the oldest and on the newest supported release
# make sizes           file and function sizes, a mirror and not a gate
# make docs            rewrites the list of modules in docs/architecture.md
# make lint | format | clean
#
# Each target makes the virtual environment that it needs, once. Another interpreter: make PYTHON=python3.12 ...

SHELL := bash
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
OLDEST := .venv-oldest

# One thread a worker: two workers with two threads each would fight over two cores.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := -m pytest -q -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-native test-upstream lint format docs sizes clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

$(VENV)/.run: constraints.txt pyproject.toml tools/make_venv.sh
	@tools/make_venv.sh $(VENV) constraints.txt "" $(PYTHON)
	@touch $@

$(VENV)/.dev: constraints.txt pyproject.toml tools/make_venv.sh
	@tools/make_venv.sh $(VENV) constraints.txt test,dev $(PYTHON)
	@touch $@ $(VENV)/.run

$(OLDEST)/.test: constraints-oldest.txt pyproject.toml tools/make_venv.sh
	@tools/make_venv.sh $(OLDEST) constraints-oldest.txt test $(PYTHON)
	@touch $@

demo: $(VENV)/.run
	@$(VENV)/bin/turbomoe demo

test: $(VENV)/.dev
	@echo "== Testing with $(JOBS) workers"
	@$(TEST_ENV) $(VENV)/bin/python $(PYTEST) --durations=10

test-slow: $(VENV)/.dev
	@$(TEST_ENV) $(VENV)/bin/python $(PYTEST) -m slow --durations=10

test-upstream: $(VENV)/.dev $(OLDEST)/.test
	@for venv in $(OLDEST) $(VENV); do \
		echo "== Contracts on $$($$venv/bin/python -c 'import transformers; print("transformers", transformers.__version__)')"; \
		$(TEST_ENV) $$venv/bin/python $(PYTEST) tests/upstream || exit 1; \
	done

test-native: $(VENV)/.dev
	@PYTHON=$(VENV)/bin/python tests/native/run_sanitizers.sh
	@$(TEST_ENV) $(VENV)/bin/python $(PYTEST) -m slow tests/native/test_planted_bugs.py

lint: $(VENV)/.dev
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy

format: $(VENV)/.dev
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

docs:
	@$(PYTHON) tools/module_map.py

sizes:
	@$(PYTHON) tools/code_sizes.py

clean:
	rm -rf $(VENV) $(OLDEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find turbomoe tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
