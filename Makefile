# Everything that a person or a pipeline does with this repository. `make help` lists it.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:

MODEL ?= smollm2-135m
DATA ?= data
IMAGE ?= apiary:latest
VARIANT ?= cpu

venv := .venv
bin := $(venv)/bin
stamp := $(venv)/.complete

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: $(stamp) ## Create .venv with everything in it; .venv/bin/apiary works afterwards

$(stamp): pyproject.toml hatch_build.py scripts/setup.sh $(wildcard server/apiary_server/model/backends/cpu/*.[ch])
	@scripts/setup.sh
	@touch $@

.PHONY: model
model: $(stamp) ## Fetch and convert the model MODEL (default smollm2-135m), once
	@[ -d "$(MODEL)" ] || $(bin)/apiary models pull $(MODEL) </dev/null >/dev/null

.PHONY: chat
chat: model ## Start a worker and chat with it here (answers of up to 256 tokens); lines piped to stdin are turns; flags in ARGS
	@$(bin)/python scripts/chat.py $(MODEL) --max-tokens 256 $(ARGS)

.PHONY: serve
serve: model ## Start a worker on 127.0.0.1:50051; flags in ARGS
	@exec $(bin)/apiary serve --model $(MODEL) $(ARGS)

.PHONY: bench
bench: model ## Measure the bare engine: tokens per second; flags, or another experiment, in ARGS (--help lists them)
	@$(bin)/apiary bench engine $(ARGS) --model $(MODEL)

.PHONY: bench-policies
bench-policies: model ## Measure what each cache policy costs of a decode step; flags in ARGS
	@$(bin)/python benchmarks/policies.py --model $(MODEL) $(ARGS)

.PHONY: bench-snapshots
bench-snapshots: model ## Measure what compressed snapshots change, on the evaluation files in DATA; flags in ARGS
	@$(bin)/python benchmarks/snapshots.py --model $(MODEL) --data $(DATA) $(ARGS)

.PHONY: bench-quality
bench-quality: model ## Measure what cache policies cost in quality on the evaluation files in DATA; flags in ARGS
	@$(bin)/apiary bench quality --model $(MODEL) --data $(DATA) $(ARGS)

.PHONY: test
test: lint model ## Lint, type-check, and run all tests, two at a time, and those that measure time alone; or pytest's arguments in ARGS (-n 0: one at a time)
	@$(bin)/python -m pytest -n 2 --dist worksteal $(if $(ARGS),$(ARGS),-m "not alone")
	@$(if $(ARGS),,$(bin)/python -m pytest -m alone)

.PHONY: test-kills
test-kills: $(stamp) ## Kill workers 200 times, at random and at each point of a commit: nothing may be lost
	@$(bin)/python -m pytest tests/system/test_kills.py --kills 200 $(ARGS)

.PHONY: lint
lint: $(stamp) proto-check ## Check style, formatting, types and the protobuf files
	@$(bin)/ruff check .
	@$(bin)/ruff format --check .
	@$(bin)/mypy
	@cd proto && ../$(bin)/buf lint

.PHONY: format
format: $(stamp) ## Format the code and fix what can be fixed by itself
	@$(bin)/ruff check --fix .
	@$(bin)/ruff format .

.PHONY: proto
proto: $(stamp) ## Regenerate the Python beside proto/**/*.proto
	@PYTHON=$(bin)/python scripts/protos.sh

.PHONY: proto-check
proto-check: $(stamp) ## Check that the generated Python is fresh
	@PYTHON=$(bin)/python scripts/protos.sh --check

.PHONY: image
image: ## Build the container image IMAGE (VARIANT=cpu|cuda, MODEL=name|none)
	docker build --build-arg VARIANT=$(VARIANT) --build-arg MODEL=$(MODEL) --tag $(IMAGE) .

.PHONY: clean
clean: ## Remove .venv, caches and build products (not the fetched models)
	rm -rf $(venv) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find benchmarks buzz client examples proto scripts server tests -name __pycache__ -prune -exec rm -rf {} +
