# Everything runs in .venv, which the first target that needs it makes. pip's own settings (index, cache) apply.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
DEMO_MADE := .venv/.demo

.DEFAULT_GOAL := help
.PHONY: help install demo test check docs bench clean

help:
	@echo "make demo   train digits in 4 blocks, beside backprop; prints a table, writes demo/comparison.png"
	@echo "make test   the tests; no network once installed"
	@echo "make check  ruff, mypy, import-linter"
	@echo "make docs   the documentation, into site/"
	@echo "make bench  the benchmarks, into docs/results/"
	@echo "make clean  remove what these made"

install: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "blockprop needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

demo: $(READY)
	@if [ -e demo ] && [ ! -e $(DEMO_MADE) ]; then \
		echo "./demo is there and was not made by make demo; move it away first"; exit 1; fi
	@rm -rf demo
	@touch $(DEMO_MADE)
	$(BIN)/blockprop compare --data digits --blocks 4 --depth 5 --width 128 --threads 1 --seeds 0 1 2 \
		--variant backprop --variant exact --variant published --out demo
	@echo "figure: demo/comparison.png"

test: $(READY)
	$(BIN)/python -m pytest -n 2

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)
	$(BIN)/mkdocs build --strict

bench: $(READY)
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.threads

clean:
	@if [ -e $(DEMO_MADE) ]; then rm -rf demo; fi
	rm -rf .venv site build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src -name '*.egg-info' -prune -exec rm -rf {} +
	find src tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +
