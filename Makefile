# Two commands do everything on a fresh machine with Python >= 3.10 and make:
#
#   make demo    make demo models, plan and run a merge of them, show that it worked
#   make test    run all tests
#
# Both set up .venv first. Others: make coverage, make lint, make docs, make docs-serve, make bench,
# make measure-methods, make methods-page, make clean, and make prove-low-memory,
# make check-memory, make check-determinism,
# make compare-mergekit, make compare-forms, make compare-tokenizers, make crash-matrix,
# make cluster-matrix, make simulate-cluster, make measure-cluster, make fuzz (minutes each),
# make soak (an hour).

PYTHON ?= python3
VENV   ?= .venv
# Installed before anything that depends on it, so that every set-up has the same torch.
TORCH  ?= torch==2.13.0
PYTEST_WORKERS ?= 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test coverage lint format docs docs-serve bench measure-methods methods-page clean help \
        measure-pages measure-planning measure-remote measure-remote-planning screenshots \
        measure-store crash-store \
        prove-low-memory check-memory check-determinism compare-mergekit compare-forms \
        compare-tokenizers crash-matrix cluster-matrix simulate-cluster measure-cluster soak fuzz

help:
	@sed -n '3,11p' Makefile | cut -c3-

$(INSTALLED): pyproject.toml setup.py Makefile $(wildcard lazymerge/engine/native/*.[ch])
	@echo "setting up $(VENV) (first time: some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) "$(TORCH)"
	@$(PIP) --editable ".[test,lint,demo,docs]"
	@touch $(INSTALLED)

demo: $(INSTALLED)
	@echo; echo "1. Three small models: a base, and two fine-tunes with a skill each"; echo
	@$(BIN)/python scripts/make_demo_models.py demo/models
	@echo; echo "2. The plan"; echo
	@$(BIN)/lazymerge plan plans/demo_task_arithmetic.yml --dry-run
	@echo; echo "3. The merge"; echo
	@$(BIN)/lazymerge run plans/demo_task_arithmetic.yml -o demo/merged --overwrite
	@echo; echo "4. Does the merged model have both skills?"; echo
	@$(BIN)/python scripts/evaluate_demo.py demo/models demo/merged

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS)

# The same, half as long again.
coverage: $(INSTALLED)
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --cov --cov-report=term:skip-covered

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# What mkdocs-material says of its own future is not for every build.
docs: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "the site is in site/; open site/index.html"

docs-serve: $(INSTALLED)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

bench: $(INSTALLED)
	$(BIN)/python scripts/bench.py

measure-methods: $(INSTALLED)
	$(BIN)/python scripts/measure_methods.py

measure-planning: $(INSTALLED)
	$(BIN)/python scripts/measure_planning.py

measure-remote: $(INSTALLED)
	$(BIN)/python scripts/measure_remote.py

measure-remote-planning: $(INSTALLED)
	$(BIN)/python scripts/measure_remote_planning.py

measure-pages: $(INSTALLED)
	$(BIN)/python scripts/measure_pages.py

measure-store: $(INSTALLED)
	$(BIN)/python scripts/measure_store.py

crash-store: $(INSTALLED)
	$(BIN)/python scripts/crash_store.py

screenshots: $(INSTALLED)
	$(BIN)/python scripts/make_screenshots.py

methods-page: $(INSTALLED)
	$(BIN)/python scripts/make_methods_page.py

prove-low-memory: $(INSTALLED)
	PYTHON=$(BIN)/python scripts/prove_low_memory.sh

check-memory: $(INSTALLED)
	$(BIN)/python scripts/check_memory.py
	$(BIN)/python scripts/check_memory.py --large

check-determinism: $(INSTALLED)
	$(BIN)/python scripts/check_determinism.py

compare-mergekit: $(INSTALLED)
	$(BIN)/python scripts/compare_with_mergekit.py

compare-forms: $(INSTALLED)
	$(BIN)/python scripts/compare_forms_with_mergekit.py --recipes 60

compare-tokenizers: $(INSTALLED)
	$(BIN)/python scripts/compare_tokenizers.py
	$(BIN)/python scripts/compare_tokenizers.py --random 60

crash-matrix: $(INSTALLED)
	$(BIN)/python scripts/crash_matrix.py

simulate-cluster: $(INSTALLED)
	$(BIN)/python scripts/simulate_cluster.py

measure-cluster: $(INSTALLED)
	$(BIN)/python scripts/measure_cluster.py

cluster-matrix: $(INSTALLED)
	$(BIN)/python scripts/cluster_matrix.py

soak: $(INSTALLED)
	$(BIN)/python scripts/soak.py

fuzz: $(INSTALLED)
	$(BIN)/python scripts/fuzz.py

clean:
	rm -rf $(VENV) demo build site *.egg-info .coverage .hypothesis .mypy_cache .ruff_cache .pytest_cache
