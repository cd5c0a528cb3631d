# make run     serve the bundled model from a prefill/decode cluster
# make test    run all tests
# Both set the environment up first, in .venv.

SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=
ARGS ?=

ifdef GPU
REQUIREMENTS := requirements-gpu.txt
else
REQUIREMENTS := requirements-cpu.txt
endif

.PHONY: run test setup check format proto clean

run: $(VENV)/.installed
	@exec $(BIN)/baton up $(MODEL) $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

setup: $(VENV)/.installed

$(VENV)/.installed: $(REQUIREMENTS) pyproject.toml deploy/setup.sh
	PYTHON=$(PYTHON) GPU=$(GPU) deploy/setup.sh $(VENV) $(REQUIREMENTS)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -r requirements-dev.txt
	@touch $@

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.installed-dev
	$(BIN)/python -m grpc_tools.protoc -Icluster/wire=proto/baton/v1 \
		--python_out=. --pyi_out=. --grpc_python_out=. \
		cluster/wire/worker.proto cluster/wire/kv.proto

clean:
	rm -rf $(VENV) build dist *.egg-info
