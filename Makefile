# The two commands are `make demo` and `make test`; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
# Extra flags for installing torch, such as the index of its CPU builds.
TORCH_FLAGS ?=
BIN := $(VENV)/bin

.PHONY: help install demo test check format proto clean

help:
	@echo "make demo     install, then serve the bundled checkpoint and stream some prompts (CPU)"
	@echo "make test     install, then run every check and the test suite"
	@echo "make install  make the environment in $(VENV)"
	@echo "make check    static checks alone: style, types, import layers, protos"
	@echo "make format   let ruff format the code"
	@echo "make proto    generate the protobuf code anew"
	@echo "make clean    remove $(VENV) and caches"

install: $(VENV)/.installed

demo: install
	$(BIN)/janus demo

test: check
	$(BIN)/pytest

check: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/buf lint

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: $(VENV)/.installed-dev
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --grpc_python_out=proto \
		--mypy_out=quiet:proto --mypy_grpc_out=quiet:proto proto/janus_proto/v1/*.proto

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Janus needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Without a GPU a plain `torch` would pull gigabytes of CUDA packages. A torch that is there, as in an
# environment of your own named by VENV, is left alone.
$(VENV)/.torch: | $(BIN)/python
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then \
		echo "using the torch that is there"; \
	elif nvidia-smi -L >/dev/null 2>&1; then \
		$(BIN)/pip install $(TORCH_FLAGS) 'torch>=2.11'; \
	else \
		$(BIN)/pip install $(TORCH_FLAGS) torch==2.13.0; \
	fi
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.torch
	$(BIN)/pip install -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.torch
	$(BIN)/pip install -e '.[dev]'
	@touch $@ $(VENV)/.installed
