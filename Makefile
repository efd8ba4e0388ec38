.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# How many test processes; each runs its models on one thread.
JOBS   ?= 2

# Which example servers, and where cargo builds: gigabytes that do not belong into the tree.
EXAMPLES ?= go rust typescript java cpp python
export CARGO_TARGET_DIR ?= $(HOME)/.cache/rlhf-services/cargo

.PHONY: help setup demo test test-all examples check protos monitoring bench constraints clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make the virtual environment and install everything, at the versions of constraints.txt

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	UV_BUILD_CONSTRAINT=constraints.txt $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) $(if $(filter go,$(REWARD)),example-go) ## Run PPO over the three processes on film reviews and show the reward rising (MODEL= DATA= REWARD=)
	$(BIN)/python -m demo $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) $(if $(REWARD),--reward $(REWARD))

test: $(READY) ## Run the tests that fit in a few minutes
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow and not examples and not trl"

test-all: $(READY) .venv-trl/.ready ## Run the slow tests too, and those against TRL 0.11.4 in its own environment
	TRL_PYTHON=$(CURDIR)/.venv-trl/bin/python $(BIN)/python -m pytest -n $(JOBS) -m "not examples"

.venv-trl/.ready: tests/trainer/parity/requirements-trl.txt | $(READY)
	@test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	$(BIN)/uv pip install --quiet --python .venv-trl/bin/python -r $<
	@touch $@

examples: $(READY) $(EXAMPLES:%=example-%) ## Build the example servers and clients, run their tests and the conformance kit (EXAMPLES="go rust …")
	$(BIN)/python -m pytest -n $(JOBS) -m examples -k "$(foreach language,$(EXAMPLES),[$(language)] or) $(if $(filter go,$(EXAMPLES)),[grpcurl] or) none"

# Each by the tools of its language; buf comes from the virtual environment.
example-%: export PATH := $(CURDIR)/$(BIN):$(PATH)
example-%: $(READY)
	cd reward_server/examples/$* && $(BUILD_AND_TEST_$*)
	$(if $(BUILD_CLIENT_$*),cd docs/clients/$* && $(BUILD_CLIENT_$*))

BUILD_AND_TEST_go         = buf generate && go build -o bin/reward . && go vet . && go test .
BUILD_AND_TEST_rust       = cargo build --release && cargo test --release
BUILD_AND_TEST_typescript = npm ci --no-audit --no-fund && npm run build && npm test
BUILD_AND_TEST_java       = mvn -B -ntp -q package
BUILD_AND_TEST_cpp        = cmake -S . -B build && cmake --build build -j$(JOBS) && ctest --test-dir build --output-on-failure
BUILD_AND_TEST_python     = python -m pytest -q -p no:asyncio

BUILD_CLIENT_go         = buf generate && go vet . && go build -o bin/ . github.com/fullstorydev/grpcurl/cmd/grpcurl
BUILD_CLIENT_typescript = npm ci --no-audit --no-fund && npm run build

check: $(READY) ## Lint, format, types, contract lint, and drift of what is made and committed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd reward_server/examples/python && $(CURDIR)/$(BIN)/mypy
	$(BIN)/buf lint protos
	$(BIN)/buf format protos --diff --exit-code
	$(BIN)/python scripts/protos.py --check
	$(BIN)/python scripts/protos.py --breaking
	$(BIN)/python scripts/monitoring.py --check

protos: $(READY) ## Regenerate the committed stubs from protos/
	$(BIN)/buf format protos --write
	$(BIN)/python scripts/protos.py

monitoring: $(READY) ## Make the PrometheusRule and the dashboards of k8s/monitoring/ again
	$(BIN)/python scripts/monitoring.py

bench: $(READY) .venv-trl/.ready ## Run the benchmarks and print their tables
	$(BIN)/python -m tests.benchmarks

constraints: $(READY) ## Resolve constraints.txt again after pyproject.toml changed
	$(BIN)/python scripts/constraints.py

clean: ## Remove the environments, caches and runs
	rm -rf .venv .venv-trl .cache runs dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
