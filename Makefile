# The developer's commands. Each installs what it needs first.
#
#   make doctor     what is missing, before anything is installed
#   make install    into .venv, with the versions of constraints.txt
#   make run        the main job: sparseline run --profile nano
#   make test       all tests
#   make test-cluster   chart, roles and RayJobs against a real control plane (needs Go; 15 minutes the first time)
#   make check      lint, types and the fast tests
#   make ui         MLflow on the runs of this machine
#   make images     container images, by buildah, podman or docker (BASE_IMAGE=, REGISTRY=)
#   make pin        the base image's digest into components/Containerfile, or of IMAGE=registry/name:tag
#   make check-manifests   chart, overlays and compiled pipelines: schemas, policy, drift

PYTHON ?= python3
PROFILE ?= nano
SEED ?= 0
PORT ?= 5000
BIN := .venv/bin
# Tests on two cores at once; a process that trains uses one thread there.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: doctor install run test test-cluster check types fast-tests ui
.DEFAULT_GOAL := run

doctor:
	@$(PYTHON) pipelines/doctor.py

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) pipelines/doctor.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $$($(PYTHON) pipelines/doctor.py torch-index) --editable '.[dev]'
	@touch $@

run: install
	$(BIN)/sparseline run --profile $(PROFILE) --seed $(SEED)

test: install
	$(TEST) -m 'not cluster'

# One control plane for all: these tests take turns. `make test-cluster KUBECONFIG=file` takes an existing cluster.
ifeq ($(origin KUBECONFIG),command line)
test-cluster: export SPARSELINE_TEST_KUBECONFIG := $(KUBECONFIG)
endif
test-cluster: install
	@$(BIN)/python tests/manifests/tools.py
	@$(BIN)/python -m tests.cluster.programs
	$(BIN)/python -m pytest tests/cluster

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory --jobs=2 --output-sync=target types fast-tests

types:
	$(BIN)/mypy

fast-tests:
	$(TEST) -m 'not slow and not cluster'

ui: install
	$(BIN)/sparseline ui --port $(PORT)

REGISTRY ?=
VERSION ?= 0.1.0
BASE_IMAGE ?=
BUILDER ?= $(firstword $(foreach tool,buildah podman docker,$(if $(shell command -v $(tool)),$(tool))))
BUILD := $(BUILDER) build
PREFIX := $(if $(REGISTRY),$(REGISTRY)/)sparseline-
REVISION := $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)
STAGES := synthesis pretraining post_training evaluation serving

.PHONY: images pin check-manifests

images:
	@test -n "$(BUILDER)" || { echo "make images needs buildah, podman or docker" >&2; exit 2; }
	$(BUILD) --file components/Containerfile --tag $(PREFIX)python:$(VERSION) $(if $(BASE_IMAGE),--build-arg BASE_IMAGE=$(BASE_IMAGE)) \
	  $(if $(PIP_EXTRA_INDEX_URL),--build-arg PIP_EXTRA_INDEX_URL=$(PIP_EXTRA_INDEX_URL)) \
	  --build-arg VERSION=$(VERSION) --build-arg REVISION=$(REVISION) .
	for stage in $(STAGES); do \
	  $(BUILD) --file components/$$stage/Containerfile --tag $(PREFIX)$$(echo $$stage | tr _ -):$(VERSION) \
	    --build-arg SHARED_IMAGE=$(PREFIX)python:$(VERSION) components/$$stage || exit 1; \
	done

pin:
	@$(PYTHON) components/pin.py $(IMAGE)

check-manifests: install
	@$(BIN)/python tests/manifests/tools.py
	$(TEST) tests/manifests
