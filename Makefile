# Set-up and checks. `make quickstart` and `make test` need Python 3.11 or newer with its headers, a C compiler and make.
# ARGS goes to the command: make quickstart ARGS='seed=1 name=quickstart-1'; make test ARGS='-k tracking';
# make benchmark ARGS='grpo-tiny --repeats 5'.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK := requirements/cpu.txt
MODEL := models/SmolLM2-135M-Instruct

.PHONY: quickstart test chaos benchmark check clean

quickstart: $(STAMP)
	@test -d $(MODEL) || $(BIN)/python examples/quickstart/model.py $(MODEL)
	$(BIN)/gnomon run examples/quickstart/quickstart.yaml $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

chaos: $(STAMP)
	$(BIN)/python -m tests.chaos $(ARGS)

benchmark: $(STAMP)
	$(BIN)/python -m benchmarks.peers $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv: $(STAMP)

# Installed anew when the lock or pyproject.toml changes. pip's own settings (index, find-links, constraints) apply.
$(STAMP): $(LOCK) pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@echo "Installing $(LOCK) into $(VENV): about 3 minutes"
	@$(BIN)/python -m pip install -qq --no-deps -r $(LOCK) || \
	  { echo "If torch's +cpu build was not found: it must be reachable through pip's settings" \
	         "(PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL). If pycosat was not built: install a C compiler and" \
	         "Python's headers (Debian: apt-get install gcc python3-dev)"; exit 1; }
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@
