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

PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

# Kernels for GPUs run in Triton's interpreter, which needs none. Triton lies in a folder of its own, seen by these tests
# alone: PyTorch imports it wherever it finds it, and any process would hold more memory. Its builds are for Linux;
# in the interpreter of 3.9.0 a mask that is partly a scalar is no mask.
ifeq ($(shell uname -sm),Linux x86_64)
TRITON := $(VENV)/triton
ON_TRITON := tests/test_triton.py tests/test_triton_mixed.py tests/test_rates_triton.py
endif

test: lint $(TRITON)
	$(PYTEST) $(ON_TRITON:%=--ignore=%)
ifdef TRITON
	PYTHONPATH=$(TRITON) $(PYTEST) $(ON_TRITON)
endif

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

$(VENV)/triton: | $(STAMP)
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --target $@ 'triton>=3.6,<3.9'

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
