# Everything a fresh machine needs is installed here, into .venv; only Python >= 3.10 and make are assumed.
PYTHON ?= python3
BIN := .venv/bin
# Tests and the demo never reach for a hub.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# A process for each core, and one thread each: networks in tests are too small to share.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: demo demo-control test test-fast test-int8 lint format clean

demo: .venv/installed
	$(BIN)/motionrag demo

demo-control: .venv/installed
	$(BIN)/motionrag demo --control

test: .venv/installed
	$(PYTEST)

test-fast: .venv/installed
	$(PYTEST) -m "not slow"

# torchao is no part of the environment: diffusers would print its warnings in every command.
test-int8: .venv/installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .venv/int8 'torchao>=0.15'
	PYTHONPATH=.venv/int8 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/backbones/every/test_memory.py -k int8

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pydoclint --quiet motionrag
	$(BIN)/vulture

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv outputs

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "motionrag needs Python 3.10 or newer; call make PYTHON=/path/to/python3.10")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[cpu,dev]'
	# jsonargparse and pydoclint bring two packages that both write docstring_parser/; the fork serves either.
	$(BIN)/python -m pip install --quiet --no-deps --force-reinstall docstring-parser-fork
	touch $@
