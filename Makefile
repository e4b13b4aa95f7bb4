# Everything on a bare machine with Python 3.11 or later: make demo, make test.
#
#   PYTHON=python3.12 make test      another interpreter
#   make demo DEMO_FLAGS=--quick      two minutes, on a smaller slide (wholegrad demo --help)
#   PIP_FLAGS="..." make demo        e.g. --index-url of a mirror, or of PyTorch's CPU wheels as --extra-index-url

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

ifeq ($(origin WHOLEGRAD_DATA),undefined)
ifneq ($(wildcard ../shared/data/.),)
export WHOLEGRAD_DATA := $(abspath ../shared/data)
endif
endif

.PHONY: demo test wheel docs support lint format clean

demo: $(STAMP)
	$(BIN)/wholegrad demo --out out/demo $(DEMO_FLAGS)

test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Wheel and sdist in dist/; files in them are as old as the last commit, so that the same sources give the same bytes.
wheel: $(STAMP)
	rm -rf dist
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || echo 1700000000)} \
	$(BIN)/python -m build --no-isolation --outdir dist .

# The site, warnings as errors: out/site/index.html
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Measures every row of docs/support.md and writes it.
support: $(STAMP)
	WHOLEGRAD_WRITE_SUPPORT=1 $(BIN)/python -m pytest -q tests/test_support.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("wholegrad needs Python 3.11 or later")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
