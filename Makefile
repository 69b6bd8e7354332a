# Everything runs in .venv, which is made once, with Python >= 3.11 (PYTHON=... to choose one).
#   make test TORCH=torch==2.13.0           another torch than the newest
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu    without CUDA, which takes 4 GB
# After `make clean` the environment is made anew.
TORCH ?= torch
TORCH_INDEX ?=
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

VENV := .venv
READY := $(VENV)/.ready
BIN := $(VENV)/bin

.PHONY: demo test lint bench results clean

demo: $(READY)
	$(BIN)/python scripts/demo.py

# A process a core, at most four: the tests of a file share what it has prepared.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python scripts/bench.py

results: $(READY)
	$(BIN)/python scripts/results.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml hatch_build.py startup/hcot_lmeval.pth startup/hcot_lmeval.start
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found; install one or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo 'making $(VENV): some minutes, most of them for $(TORCH)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)' $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)')
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
