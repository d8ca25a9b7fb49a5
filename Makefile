# What can be done here: `make help`. Needs make, git and Python 3.11 or newer.

PYTHON ?= python3
DEMO_FLAGS ?=
TEST_FLAGS ?=
JOBS ?= 2

# The other environment that is tested, of the oldest versions: see test-oldest.
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRA ?= dev

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq  # -qq: errors only
TORCH := $(shell sed -n 's/^torch==//p' $(CONSTRAINTS))

.DEFAULT_GOAL := help
.PHONY: help .venv demo test test-oldest lint format docs notebooks build clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z.-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.venv: $(STAMP)  ## create or update the environment in .venv (other targets do it themselves)

demo: $(STAMP)  ## pretrain a small model here and look at its batch size grow; more flags: DEMO_FLAGS="..."
	$(BIN)/hf-adaptive-batch pretrain --output_dir runs/demo --save_strategy no $(DEMO_FLAGS)

# A file's tests stay in one process, where they share what was costly to make.
test: $(STAMP)  ## run all tests, JOBS=2 at a time; fewer: TEST_FLAGS="-m 'not slow'"
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(TEST_FLAGS)

test-oldest:  ## run the quick tests on the oldest supported versions, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt EXTRA=test TEST_FLAGS="-m 'not slow' --ignore tests/test_docs.py"

lint: $(STAMP)  ## check format, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the files in the project's format
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

docs: $(STAMP)  ## build the documentation into build/docs; a warning is an error
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "open build/docs/index.html"

notebooks: $(STAMP)  ## run all notebooks from a clean kernel, and write their outputs and pictures
	$(BIN)/python notebooks/run.py

build: $(STAMP)  ## build wheel and sdist into dist/
	$(BIN)/python -m build

clean:  ## remove the environment, build outputs and caches; runs/ stays
	rm -rf .venv .venv-oldest build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an interrupted installation is taken up again, and one that is complete is left alone until
# the dependencies or their pins change.
#
# PyPI's torch for Linux brings gigabytes of CUDA. Without an NVIDIA GPU the CPU build of the same version is enough, so
# it is looked for in this order:
#   1. a folder of wheels that the user gave to pip (PIP_FIND_LINKS or `find-links`), without asking any server;
#   2. PyTorch's own index of CPU builds;
#   3. PyPI, like everywhere else (macOS has no CUDA build; with a GPU the CUDA build is the right one).
# --no-deps in 1 and 2: what torch needs comes with everything else in the next step.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "error: '$(PYTHON)' was not found; install Python 3.11 or newer, or name one: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: Python 3.11 or newer is needed and '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1); name another: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: '$(PYTHON)' cannot create environments (no venv or no ensurepip); on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || { \
		echo "[1/3] creating the environment in $(VENV) with $$("$(PYTHON)" --version)"; \
		"$(PYTHON)" -m venv --clear $(VENV); }
	@if [ "$$(uname -s)" = Linux ] && ! nvidia-smi >/dev/null 2>&1; then \
		echo "[2/3] installing torch $(TORCH) for the CPU: no NVIDIA GPU here (about 200 MB)"; \
		$(PIP) install --no-deps --no-index "torch==$(TORCH)+cpu" >/dev/null 2>&1 \
		|| $(PIP) install --no-deps --index-url https://download.pytorch.org/whl/cpu "torch==$(TORCH)" \
		|| { echo "      no CPU build could be had; taking the one from PyPI (several GB)"; \
			$(PIP) install -c $(CONSTRAINTS) torch; }; \
	else \
		echo "[2/3] installing torch $(TORCH)"; \
		$(PIP) install -c $(CONSTRAINTS) torch; \
	fi
	@echo "[3/3] installing hf-adaptive-batch and what it needs (some minutes the first time)"
	@$(PIP) install -c $(CONSTRAINTS) -e '.[$(EXTRA)]'
	@touch $(STAMP)
