# make demo · make test · make lint · make bench · make gpu: each sets up .venv in a fresh checkout and works offline afterwards.
# Another Python: make demo PYTHON=python3.12
PYTHON ?= python3
# Test files run side by side, each with one thread. More for pytest: make test OPTIONS='--threads 2 --durations=20'
WORKERS ?= 2
BIN := .venv/bin
.PHONY: demo test lint bench gpu clean
# Nothing here needs a model hub; without this, libraries may wait for one.
export HF_HUB_OFFLINE := 1

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: .venv/installed
	$(BIN)/fastgen train recipes/digits_dmd2_1step.yaml --output runs/demo --overwrite

test: .venv/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m 'not slow and not gpu' $(OPTIONS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: .venv/installed-dev
	$(BIN)/python benchmarks/quality.py --readme

# make gpu DRY=1 rehearses on the CPU; more for the script: make gpu OPTIONS='--budget 3m --only attention'
gpu: .venv/installed-dev
	$(BIN)/python benchmarks/gpu.py $(if $(DRY),--rehearse) $(OPTIONS)

clean:
	rm -rf .venv
