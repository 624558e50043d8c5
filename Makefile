# Every target sets up what it needs. `make help` lists them.
#   make PYTHON=/path/to/python test     uses that interpreter for a new environment
#   make demo ARGS="--help"              passes arguments on

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-full test-newest lint notebooks clean

# Oldest first: `make test` checks the oldest supported Python, `make test-newest` the newest.
PYTHONS := python3.11 python3.12 python3.13 python3
NEWEST_PYTHONS := python3.13 python3.12

VENV := .venv
NEWEST_VENV := .venv-newest
PY := $(VENV)/bin/python

# Two processes, each with whole files, whose fixtures and compiled programs are then shared: most
# of the time is tracing and compiling, which take little more than one core. With more cores try
# PYTEST_ARGS="-n 4 --dist loadfile"; for a debugger, PYTEST_ARGS=.
PYTEST_ARGS ?= -n 2 --dist loadfile
PYTEST := -m pytest -q $(PYTEST_ARGS)

# A test runs its programs once, on small arrays: to compile them well takes longer than to run
# them compiled badly. This halves the time of the tests, on the versions of XLA that know all the
# flags; others abort on one that they do not know. test-full and test-newest compile as users do.
QUICK_XLA := --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true \
  --xla_cpu_use_fusion_emitters=false
quick_xla = XLA_FLAGS="$(QUICK_XLA)" $(PY) -c 'import jax; jax.devices()' >/dev/null 2>&1 \
  && echo "$(QUICK_XLA)" || true

# Large temporaries of a training step pay for page faults; transparent huge pages make
# the step of a small CNN 1.2 to 2 times faster on CPU.
ifeq ($(shell uname -s),Linux)
GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
demo: export GLIBC_TUNABLES := $(GLIBC_TUNABLES)
endif

# $(call find_python,names) prints the first interpreter that starts, is 3.11 or newer and can
# make an environment. A name on PATH is no proof: a pyenv shim fails for versions not
# selected, and some systems ship Python without ensurepip. So each is run first.
define find_python
works() { "$$1" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }; \
for name in $(1); do \
  for p in $$(type -ap "$$name"); do if works "$$p"; then echo "$$p"; exit; fi; done; \
  if command -v pyenv >/dev/null; then \
    for v in $$(pyenv versions --bare | grep -E "^$${name#python}(\.|$$)" | sort -rV); do \
      p=$$(PYENV_VERSION=$$v pyenv which python 2>/dev/null) || continue; \
      if works "$$p"; then echo "$$p"; exit; fi; \
    done; \
  fi; \
done; true
endef

# $(call install,venv,python) makes the environment, or brings it up to date. Only a finished
# one holds the stamp, with the path it was made for; a broken, half-made or moved one is made anew.
# Packages that come as source alone (promise, of tensorflow-datasets) need setuptools, which
# Python 3.12 and later no longer bring; an old one lacks bdist_wheel.
define install
set -e; \
if ! $(call ready,$(1)); then \
  if [ -z "$(2)" ]; then echo "quantjax needs Python 3.11 or newer with venv; none found" >&2; exit 1; fi; \
  echo "making $(1) with $(2)"; \
  rm -rf $(1); \
  "$(2)" -m venv $(1); \
fi; \
pip() { $(1)/bin/python -m pip --disable-pip-version-check install -q -c constraints.txt "$$@"; }; \
pip hatchling editables setuptools; \
pip --no-build-isolation -e '.[qat,experiments,dev]'; \
echo "$(CURDIR)" > $(1)/.installed
endef
ready = { [ "$$(cat $(1)/.installed 2>/dev/null)" = "$(CURDIR)" ] && $(1)/bin/python -c '' 2>/dev/null; }

# A stamp alone proves little, so an environment that is not ready is always remade.
ifneq ($(shell $(call ready,$(VENV)) && echo yes),yes)
.PHONY: $(VENV)/.installed
endif
ifneq ($(shell $(call ready,$(NEWEST_VENV)) && echo yes),yes)
.PHONY: $(NEWEST_VENV)/.installed
endif

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(call install,$(VENV),$(or $(PYTHON),$(shell $(call find_python,$(PYTHONS)))))

$(NEWEST_VENV)/.installed: pyproject.toml constraints.txt
	@$(call install,$(NEWEST_VENV),$(shell $(call find_python,$(NEWEST_PYTHONS))))

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/.installed ## run the article's experiment; ARGS="..." is passed on
	$(PY) -m experiments.article $(ARGS)

test: lint ## lint, tests, doctests and notebooks, as on every change
	XLA_FLAGS="$${XLA_FLAGS-$$($(quick_xla))}" $(PY) $(PYTEST)
	@$(MAKE) --no-print-directory notebooks

test-full: lint ## the same with the slow tests
	$(PY) $(PYTEST) -m ""
	@$(MAKE) --no-print-directory notebooks

test-newest: ## tests and doctests on the newest Python and JAX the constraints name
	@if $(call ready,$(NEWEST_VENV)) || [ -n "$$($(call find_python,$(NEWEST_PYTHONS)))" ]; then \
	  $(MAKE) --no-print-directory $(NEWEST_VENV)/.installed; \
	  $(NEWEST_VENV)/bin/python -c 'import sys, jax; print("Python", sys.version.split()[0], "JAX", jax.__version__)'; \
	  $(NEWEST_VENV)/bin/python $(PYTEST); \
	else \
	  echo "no Python newer than 3.11 here ($(NEWEST_PYTHONS)): nothing to test"; \
	fi

lint: $(VENV)/.installed ## ruff check, ruff format --check, mypy
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy $(wildcard quantjax experiments)

notebooks: $(VENV)/.installed ## compare each notebook with its text twin, then run it
	@for nb in $(wildcard notebooks/*.ipynb); do \
	  twin=$$(ls "$${nb%.ipynb}".py "$${nb%.ipynb}".md 2>/dev/null || true); \
	  if [ -z "$$twin" ]; then echo "$$nb has no text twin (.py or .md)" >&2; exit 1; fi; \
	  cells=$$($(call as_text,$$nb)); \
	  twin_cells=$$($(call as_text,$$twin)); \
	  if ! diff <(echo "$$cells") <(echo "$$twin_cells"); then \
	    echo "$$nb and $$twin differ: run $(PY) -m jupytext --sync $$nb" >&2; exit 1; \
	  fi; \
	done
	$(if $(wildcard notebooks/*.ipynb),$(PY) $(PYTEST) --nbmake --nbmake-timeout=1800 $(wildcard notebooks/*.ipynb))

# Outputs and metadata may differ between a notebook and its twin; the cells may not.
as_text = $(PY) -m jupytext --quiet --to py:percent --opt notebook_metadata_filter=-all \
  --opt cell_metadata_filter=-all --output - $(1)

clean: ## remove environments, caches and build output; runs/ stays
	rm -rf .venv .venv-newest build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name .git -prune -o -type d \( -name __pycache__ -o -name '*.egg-info' \) -print0 | xargs -0 rm -rf
