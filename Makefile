# Every target makes .venv from the exact pins of constraints.txt first, when it is missing or stale.
PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
VENV := .venv
STAMP := $(VENV)/.installed
BENCHES := $(sort $(wildcard experiments/bench/*.py))

.PHONY: help run test bench families lint format
.DEFAULT_GOAL := help

help:
	@echo "make run  [ARGS='group=option key=value']  run one experiment: by default the embedded one"
	@echo "make test [ARGS='tests/test_store.py -x']   run the tests"
	@echo "     [WORKERS=4]                            by so many processes at a time (2)"
	@echo "make bench                                  run the benchmarks of experiments/bench in turn"
	@echo "make families                               check every MoE model type that transformers has"
	@echo "make lint                                   check style and formatting (ruff), types (mypy)"
	@echo "make format                                 correct style and formatting with ruff"
	@echo "PYTHON=python3.12 make ...                  choose the interpreter that .venv is made from"

run: $(STAMP)
	$(VENV)/bin/python run.py $(ARGS)

test: $(STAMP)
	$(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

# Every benchmark runs, also after a failed one; the target fails if any did.
bench: $(STAMP)
	@failed=0; \
	for bench in $(BENCHES); do \
		echo "== $$bench"; \
		$(VENV)/bin/python $$bench || failed=1; \
	done; \
	exit $$failed

# Of every type, by tiny random models, and the table of docs/families.md anew: about ten minutes.
families: $(STAMP)
	$(VENV)/bin/python -m moe_lab.families --processes $(WORKERS) --write docs/families.md README.md

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "moe_lab needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
			"Name another one: PYTHON=python3.12 make $(MAKECMDGOALS)"; exit 2; }
	@echo "Installing the pinned packages into $(VENV) (once; again when the pins change)."
	@echo "The largest is torch: about 0.2 GB as a CPU build, about 3 GB with the CUDA libraries," \
		"which pip chooses by itself from the package index it is set to."
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
