# GNU make. Every target sets up what it needs in ./.venv and is fast once that is done.

PYTHON ?= python3
# Installed before everything else and alone, so that the build you choose stays. Another
# index:  make generate TORCH="torch --index-url <your index>"
TORCH ?= torch==2.13.0
# Extra arguments of "dllmserve generate", pytest, "dllmserve serve", chaos and "dllmserve eval",
# and the command of bench.
ARGS ?=
TESTS ?=
# Test files that run at a time.
JOBS ?= 2
# What a processor's vector instructions could change: the bits of what is ours, and the tokens.
NUMERICS := tests/models/test_places.py tests/models/test_forward.py tests/decoding/test_stats.py \
  tests/kernels/test_layer_kernels.py tests/engine/test_golden.py tests/engine/test_invariance.py \
  tests/parallel/test_rank_tokens.py -k "not two_processes and not test_golden_mixed"
SERVE ?=
BENCH ?= -m benchmarks.cpu_vs_loop
SCORES ?= --unmask threshold
CHAOS ?=
CLIENTS ?=

VENV := .venv
FUZZ := .venv-fuzz
PLAYED := .venv-clients
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help generate serve test numerics check fmt bench fuzz clients chaos scores clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

generate: $(READY) ## set up, then generate text on this machine; PROMPT="..." asks your own question
ifeq ($(origin PROMPT),command line)
	@$(BIN)/dllmserve generate $(ARGS) -- "$$PROMPT"
else
	@$(BIN)/dllmserve generate --demo $(ARGS)
endif

serve: $(READY)-server ## set up, then serve the embedded model on 127.0.0.1:8000; SERVE="..." passes options
	@$(BIN)/dllmserve serve $(SERVE)

test: $(READY)-test ## set up, then run the tests; TESTS="..." passes arguments to pytest
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

numerics: $(READY)-test ## set up, then test numerics with each lesser set of vector instructions
	@levels=$$($(BIN)/python tools/capabilities.py) || exit 1; for level in $$levels; do \
	  echo "ATEN_CPU_CAPABILITY=$$level"; \
	  ATEN_CPU_CAPABILITY=$$level OMP_NUM_THREADS=1 \
	    $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(NUMERICS) || exit 1; \
	done

check: $(READY)-dev ## set up, then lint, formatting, types and file sizes
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict
	@$(BIN)/python tools/check_sizes.py

fmt: $(READY)-dev ## format the code and fix what the linter can fix
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY) ## set up, then measure the engine against a plain loop on this machine
	@$(BIN)/python $(BENCH)

fuzz: $(READY)-test $(FUZZ)/.ready ## set up, then send a server malformed requests, then generated ones
	@$(BIN)/python -m tests.server.fuzz.raw
	@$(BIN)/python -m tests.server.fuzz.schema --st $(FUZZ)/bin/st

clients: $(READY)-test $(PLAYED)/.ready ## set up, then let other people's clients play; CLIENTS="instructor ..." chooses
	@$(BIN)/python -m tests.clients $(CLIENTS)

chaos: $(READY)-test ## set up, then break a real server in many ways; CHAOS="NAME... --quick" chooses
	@$(BIN)/python -m chaos $(CHAOS)

scores: $(READY) ## set up, then reproduce the embedded model's held-out scores; SCORES="..." passes options
	@$(BIN)/dllmserve eval $(SCORES)

clean: ## remove .venv, caches and build output
	@rm -rf $(VENV) $(FUZZ) $(PLAYED) tests/clients/node/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last, so an interrupted set-up is simply run again.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "Setting up $(VENV): PyTorch first. This happens once and can take some minutes." >&2
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) $(TORCH)
	@$(PIP) --editable .
	@touch $@

# .ready-test and .ready-dev add the extra of that name
$(READY)-%: $(READY)
	@echo "Adding the packages for $*." >&2
	@$(PIP) --editable ".[$*]"
	@touch $@

# apart from .venv, whose packages it would change
$(FUZZ)/.ready:
	@echo "Setting up $(FUZZ)." >&2
	@$(PYTHON) -m venv --clear $(FUZZ)
	@$(FUZZ)/bin/python -m pip install --quiet --disable-pip-version-check schemathesis==4.32.5
	@touch $@

# one for each client: they want different versions of what they share
$(PLAYED)/.ready: $(wildcard tests/clients/requirements/*.txt) tests/clients/node/package.json
	@echo "Setting up $(PLAYED): a few hundred MB." >&2
	@for file in tests/clients/requirements/*.txt; do \
	  to=$(PLAYED)/$$(basename $$file .txt); $(PYTHON) -m venv --clear $$to || exit 1; \
	  $$to/bin/python -m pip install --quiet --disable-pip-version-check -r $$file || exit 1; \
	done
	@if command -v npm >/dev/null; then \
	  npm install --prefix tests/clients/node --silent --no-audit --no-fund --no-package-lock; \
	else echo "There is no npm, so clients of Node's are left out." >&2; fi
	@touch $@
