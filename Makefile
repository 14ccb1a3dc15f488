# The two commands of the README, and what developers run. Everything happens in .venv, from the hashed lock file.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test unit lint simulate deaths outages crowd hints platform install lock clean

help: ## this text
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

demo: install ## a year of an airline's delay model: one good version, two bad ones, live traffic
	@$(BIN)/lockgate demo $(ARGS)

test: install lint unit ## everything that CI runs

lint: install ## ruff, mypy --strict, the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: install ## the tests, real servers and the demo among them
	$(BIN)/pytest $(ARGS)

simulate: install ## the simulation, a million rollouts (ARGS="--rollouts N --seed S" for others)
	$(BIN)/python -m tests.simulation.run $(or $(ARGS),--rollouts 1000000)

deaths: install ## kill -9 of each process at each step of a rollout, on a real platform (ARGS="--victims flow")
	$(BIN)/python -m tests.e2e.deaths $(ARGS)

outages: install ## controllers that stay dead or stood still, disks that are full or cannot be written, on a real platform
	$(BIN)/pytest -q tests/e2e/outages.py $(ARGS)

crowd: install ## 20 models delivered at once on a real platform, twice (ARGS="--models 4")
	$(BIN)/python -W ignore -m tests.e2e.crowd $(ARGS)

platform: install ## a platform while Prefect's server is away, with lossy hints, and its deployments on other work pools
	$(BIN)/pytest -q tests/e2e/platform_away.py $(ARGS)

hints: install ## 100 versions whose webhooks are lost, doubled, held back and forged, on a real platform (ARGS="--postgresql")
	$(BIN)/python -W ignore -m tests.e2e.hints $(ARGS)

bench-%: install ## bench-gates, bench-ledger, bench-gateway, bench-rollback, bench-serving, bench-startup: tables, and JSON in build/benchmarks
	$(BIN)/python -m tests.benchmarks.bench_$* $(ARGS)

install: .venv/installed ## the virtual environment, from requirements.lock

.venv/installed: requirements.lock pyproject.toml infra/ci/bootstrap.lock
	@echo "Installing into .venv (once, about a minute) ..."
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else f"lockgate needs Python 3.11 or 3.12; this is {sys.version.split()[0]}; say: make PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r infra/ci/bootstrap.lock
	@$(BIN)/uv pip sync --quiet --compile-bytecode --python $(BIN)/python --require-hashes requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

lock: install ## resolve anew after a change of pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --all-extras --python-version 3.11 --generate-hashes --custom-compile-command "make lock" -o requirements.lock
	grep -E '^uv==' requirements.lock | sed 's/ .*//' | $(BIN)/uv pip compile - --generate-hashes --no-header -o infra/ci/bootstrap.lock

clean: ## the environment and everything built
	rm -rf .venv build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
