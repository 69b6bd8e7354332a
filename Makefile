# Everything runs in an environment of its own, made once, with Python >= 3.11 (PYTHON=... to choose one):
#   make test             .venv: the versions that were tested, requirements/locked.txt
#   make test LATEST=1    .venv-latest: the newest of everything
#   make test OLDEST=1    .venv-oldest: the lower ends of the ranges in pyproject.toml
#   make test TORCH=torch==2.12.0 TORCH_INDEX=URL    another PyTorch than these, from another index
# After `make clean` they are made anew. scripts/environment.py says which PyTorch is taken.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

VERSIONS := $(if $(LATEST),latest,$(if $(OLDEST),oldest,locked))
VENV := .venv$(if $(filter-out locked,$(VERSIONS)),-$(VERSIONS))
READY := $(VENV)/.ready
BIN := $(VENV)/bin

.PHONY: demo test lint docs bench results clean

demo: $(READY)
	$(BIN)/python scripts/demo.py

# A process a core, at most four: the tests of a file share what it has prepared.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/mypy

docs: $(READY)
	LC_ALL=C.UTF-8 $(BIN)/python -m sphinx -b html -W --keep-going --quiet docs build/docs
	@echo build/docs/index.html

bench: $(READY)
	$(BIN)/python scripts/bench.py

results: $(READY)
	$(BIN)/python scripts/results.py

clean:
	rm -rf .venv .venv-latest .venv-oldest build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml hatch_build.py startup/hcot_lmeval.pth startup/hcot_lmeval.start requirements/locked.txt \
		requirements/oldest.txt scripts/environment.py
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found; install one or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) scripts/environment.py $(VENV) --versions $(VERSIONS) \
		$(if $(TORCH),--torch '$(TORCH)') $(if $(TORCH_INDEX),--torch-index '$(TORCH_INDEX)')
	@touch $@
