# `make demo` runs the main job, `make test` passes the tests; each sets up what it needs.
# PYTHON=/path/to/python chooses the interpreter, TESTS=tests/layout the tests, WORKERS=0 runs them
# in one process.

BIN := .venv/bin
INSTALLED := .venv/.installed
TESTS ?= tests
# Processes that run tests: what one leaves of two cores while its ranks wait, the other takes.
WORKERS ?= 2

# One thread for each rank process: with more, the ranks of one machine fight over its cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test docs setup format lint types unit lock clean

help:
	@echo "make demo    train a small multimodal model under a plan, on the CPU"
	@echo "make test    format, lint, types and tests"
	@echo "make docs    write docs/plan.md anew, and check the links of all documents"
	@echo "make format  rewrite the sources as 'make test' wants them"
	@echo "make lock    bring requirements.lock up to date with setup.py"
	@echo "make clean   remove the environments and every cache"

demo: setup
	$(BIN)/python -m examples.digits.demo

test: lint types unit

setup: $(INSTALLED)

$(INSTALLED): requirements.lock setup.py tools/setup.sh tools/browser.sh
	tools/browser.sh
	tools/setup.sh

lint: setup
	$(BIN)/ruff format --check
	$(BIN)/ruff check

types: setup
	$(BIN)/pyright

unit: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --max-worker-restart 0 $(TESTS)

docs: setup
	$(BIN)/python -m tools.plan_reference
	$(BIN)/python -m tools.check_links

format: setup
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

lock:
	tools/lock.sh

clean:
	rm -rf .venv .venv-uv .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
