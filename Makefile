# make run     serve the bundled model from a prefill/decode cluster
# make test    run all tests
# make fuzz    play random fault schedules until Ctrl-C
# All set the environment up first, in .venv.

SHELL := /bin/bash
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
MODEL ?=
ARGS ?=

# make setup GPU=1 makes an environment with vLLM's CUDA build, which the other targets then use.
BUILD := $(if $(or $(GPU),$(wildcard $(VENV)/.installed-gpu)),gpu,cpu)
REQUIREMENTS := requirements-$(BUILD).txt

.PHONY: run test fuzz setup setup-nixl setup-peer check format proto clean

run: $(VENV)/.installed-$(BUILD)
	@exec $(BIN)/baton up $(MODEL) $(ARGS)

test: $(VENV)/.installed-dev-$(BUILD)
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

# SEED=123 replays one schedule and prints its events; FOR_S=600 ends after so many seconds.
fuzz: $(VENV)/.installed-dev-$(BUILD)
	@$(BIN)/python -m tests.simulation.fuzz $(if $(SEED),--seed $(SEED)) $(if $(FOR_S),--for-s $(FOR_S)) $(ARGS)

setup: $(VENV)/.installed-$(BUILD)

$(VENV)/.installed-$(BUILD): $(REQUIREMENTS) pyproject.toml deploy/setup.sh
	PYTHON=$(PYTHON) deploy/setup.sh $(VENV) $(BUILD)
	@touch $@

$(VENV)/.installed-dev-$(BUILD): $(VENV)/.installed-$(BUILD) requirements-dev.txt requirements-nixl.txt
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -r requirements-dev.txt
	@touch $@

# For handoff.transport nixl. `make test` has it, too.
setup-nixl: $(VENV)/.installed-nixl

$(VENV)/.installed-nixl: requirements-nixl.txt $(VENV)/.installed-$(BUILD)
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -r requirements-nixl.txt
	@touch $@

# What `baton bench handoff` compares with, in a folder of its own: the environment stays as it is.
setup-peer: .peer/.installed

.peer/.installed: requirements-peer.txt requirements-nixl.txt $(VENV)/.installed-$(BUILD)
	rm -rf .peer
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target .peer -r requirements-peer.txt
	@touch $@

check: $(VENV)/.installed-dev-$(BUILD)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev-$(BUILD)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(VENV)/.installed-dev-$(BUILD)
	$(BIN)/python -m grpc_tools.protoc -Icluster/wire=proto/baton/v1 \
		--python_out=. --pyi_out=. --grpc_python_out=. \
		cluster/wire/worker.proto cluster/wire/kv.proto

clean:
	rm -rf $(VENV) .peer build dist *.egg-info
