# Each target sets up what it needs in $(VENV) by itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OLDEST := $(VENV)-oldest
NEWEST := $(VENV)-newest
TFDS := $(VENV)-tfds
TPU := $(VENV)-tpu
ACCELERATORS := $(VENV)-accelerators

.PHONY: demo bench bench-accelerators test test-oldest test-newest test-tfds test-tpu lint types docs check clean

demo: $(VENV)/.examples
	$(BIN)/python -m examples.digits

# Every table of docs/costs.md; wants a quiet machine, and takes about ten minutes of two cores.
bench: $(VENV)/.examples
	$(BIN)/python -m benchmarks

# The tables of programs that are compiled for TPUs and an H100, which need not be there. Takes hours
# of two cores; what is compiled already is not compiled again.
bench-accelerators: $(ACCELERATORS)/.installed
	JAX_PLATFORMS=cpu $(ACCELERATORS)/bin/python -m benchmarks --only accelerators accelerator_steps \
		--seconds 1 --out results/accelerators

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --dist loadfile

# The lower bounds of the dependencies, without the packages of the examples.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest dtnh_jax tests

# The newest Python on the machine, if it is newer than PYTHON, and the newest dependencies for it.
test-newest:
	@newest=$$(.ci/newest-python $(PYTHON)) || exit; \
	if [ -n "$$newest" ]; then \
		"$$newest" --version; \
		rm -rf $(NEWEST); \
		$(MAKE) test PYTHON="$$newest" VENV=$(NEWEST); \
	else \
		echo "Skipped test-newest: no Python here is newer than $(PYTHON), $$($(PYTHON) --version)."; \
	fi

# Preparing data sets, the one thing that needs TensorFlow.
test-tfds: $(TFDS)/.installed
	$(TFDS)/bin/python -m pytest tests/test_builders.py tests/test_data.py

# Programs for TPUs, which need the compiler of libtpu, and no TPU.
test-tpu: $(TPU)/.installed
	JAX_PLATFORMS=cpu $(TPU)/bin/python -m pytest tests/test_accelerators.py

check: lint types docs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(OLDEST) $(NEWEST) $(TFDS) $(TPU) $(ACCELERATORS) site results

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.examples: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[examples]"
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@ $(VENV)/.examples

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet jax==0.6.0 jaxlib==0.6.0 optax==0.2.5 pytest sybil
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

$(TFDS)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(TFDS)
	$(TFDS)/bin/python -m pip install --quiet --upgrade pip
	$(TFDS)/bin/python -m pip install --quiet --editable ".[tfds]" dill pytest sybil
	touch $@

$(TPU)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(TPU)
	$(TPU)/bin/python -m pip install --quiet --upgrade pip
	$(TPU)/bin/python -m pip install --quiet --editable ".[examples]" "jax[tpu]" pytest sybil
	touch $@

$(ACCELERATORS)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(ACCELERATORS)
	$(ACCELERATORS)/bin/python -m pip install --quiet --upgrade pip
	$(ACCELERATORS)/bin/python -m pip install --quiet --editable ".[accelerators]"
	touch $@
