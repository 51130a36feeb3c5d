# Two commands need nothing before them: `make demo` and `make test`. Each makes .venv when it is missing.
PYTHON ?= python3
VENV := .venv
export NO_MKDOCS_2_WARNING := 1
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q install -c constraints.txt

.PHONY: demo test lint docs package bench bench-ranks gpu clean

demo: $(VENV)/lab
	$(BIN)/gradreg demo $(ARGS)

test: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/mkdocs build --strict -q
	$(BIN)/pytest -n 2 $(ARGS)

lint: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/pyright

docs: $(VENV)/dev
	$(BIN)/mkdocs build --strict

# The wheel and the source archive, into dist/; the test installs both into empty folders and tries them.
package: $(VENV)/dev
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/pytest tests/test_package.py

# pytorch_optimizer is the peer we are timed against; only the bench needs it.
bench: $(VENV)/dev
	$(PIP) pytorch_optimizer
	$(BIN)/python benchmarks/bench.py $(ARGS)

# The same on two processes, DDP and FSDP2.
bench-ranks: $(VENV)/dev
	$(BIN)/python benchmarks/ranks.py $(ARGS)

# What needs a GPU, in pieces; goes on with ARGS="--resume FOLDER". On a borrowed machine nothing is installed here: it
# takes any Python that has torch for the device and the packages of the extra `lab`; data: ARGS="--path data/fashion-mnist".
GPU_PYTHON ?= $(or $(wildcard $(BIN)/python),$(PYTHON))
GPU_PAGE ?= docs/gpu.md
gpu:
	PYTHONPATH=src $(GPU_PYTHON) -m gradreg gpu --write $(GPU_PAGE) $(ARGS)

# torch first and pinned, so that nothing below replaces it. On Linux PyPI's is the CUDA build of several gigabytes, unless
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu is set.
$(VENV)/torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	touch $@

$(VENV)/lab: $(VENV)/torch pyproject.toml
	$(PIP) -e '.[lab]'
	touch $@

$(VENV)/dev: $(VENV)/lab
	$(PIP) -e '.[lab,hub,tensorboard,lightning,transformers,trl,sentence-transformers,docs,dev]' peft
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed  # builds against the torch that is there
	touch $@

clean:
	rm -rf $(VENV) site dist results .pytest_cache .ruff_cache
