# `make demo` and `make test` install the packages at their first call. `make smoke` is the shortest path through
# everything, and `make docs` builds the site. More tests: make test-slow, make test-long, make test-arithmetic, and make
# test-tl4 for TransformerLens 4.x.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tests of a file run in one process, so that a study, a hub or a killed sweep that they share is made only once.
# Three processes keep two cores busy, since some tests wait for servers and for processes that they start.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
TESTS := not slow and not long
DEMO_PROBES := engagement,scale_freeze,exact_dla,neuron_statistics,scale_causes,scale_invariance,centring
TL4 := 4.3.0
VENV_TL4 := .venv-tl4
BIN_TL4 := $(VENV_TL4)/bin

.PHONY: demo smoke docs test test-slow test-long test-arithmetic test-tl4 lint

# Trains six arms with two seeds each, in at most seven minutes, and probes them with the probes that distinguish
# these arms. `soluscope probe runs/demo` runs all probes, on more text.
demo: $(VENV)/installed
	$(BIN)/soluscope sweep demo wandb=off eval.n_tokens=2000 eval.n_draws=500 eval.probes=[$(DEMO_PROBES)]

# Trains four tiny models, converts, probes and reports them, in less than two minutes.
smoke: $(VENV)/installed
	$(BIN)/soluscope sweep smoke wandb=off eval.probes=[engagement,scale_freeze] eval.n_tokens=500 eval.n_loss_tokens=2000

docs: $(VENV)/installed
	$(BIN)/mkdocs build --strict

test: lint
	$(PYTEST) -m "$(TESTS)"

# The demo end to end, sweeps that are killed and moved, and other tests of more than 20 seconds.
test-slow: $(VENV)/installed
	$(PYTEST) -m "slow and not long" --durations 25

# Every kill, every damage of a file, and clusters that lose a node.
test-long: $(VENV)/installed
	$(PYTEST) -m long

# The numeric tests, with the arithmetic of other processors.
test-arithmetic: $(VENV)/installed
	PYTHON=$(BIN)/python tests/arithmetic.sh

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "soluscope needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Compares the probes on TransformerBridge (src/soluscope/hooked/bridge.py) with those on 3.9's HookedTransformer.
test-tl4: $(VENV)/installed $(VENV_TL4)/installed
	$(BIN_TL4)/python -m pytest tests/tl4

# Installs the dependencies at the versions of constraints.txt, except for another TransformerLens.
$(VENV_TL4)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV_TL4)
	grep -v '^transformer-lens==' constraints.txt > $(VENV_TL4)/constraints.txt
	$(BIN_TL4)/python -c 'import tomllib; [print(d) for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if "transformer-lens" not in d]' > $(VENV_TL4)/requirements.txt
	$(BIN_TL4)/python -m pip install --quiet --constraint $(VENV_TL4)/constraints.txt --requirement $(VENV_TL4)/requirements.txt transformer-lens==$(TL4) pytest
	$(BIN_TL4)/python -m pip install --quiet --no-deps --editable .
	touch $@
