# Thin on purpose: every target calls a script or a package.
.DEFAULT_GOAL := help
.PHONY: help setup run up down test test-all mutants lint docs bench load deploy undeploy screenshots lock

PYTHON_BIN := .venv/bin/python
SETUP_TESTS := scripts/setup.sh dev && scripts/setup.sh policy
# Two processes for two cores; tests that share a server run in the same one (tests/conftest.py).
PROCESSES := 2
PYTEST = $(PYTHON_BIN) -m pytest -n $(PROCESSES) --dist loadgroup --no-loadscope-reorder
# One of them waits for alerts most of the time.
test-faults: PROCESSES := 3
LONG_LANES := faults load cluster
LANES := unit dbt dags manifests deploy integration e2e $(LONG_LANES)
.PHONY: $(LANES:%=test-%)

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup:
	@scripts/setup.sh

run: setup ## Set up, start all services, bring raw data to a champion, show the result
	@$(PYTHON_BIN) -m services run

up: setup ## Start all services, and nothing more
	@$(PYTHON_BIN) -m services up

down: setup ## Stop everything that run or up started; data stay
	@$(PYTHON_BIN) -m services down

test: ## Set up, lint, and run the quick lanes: one platform, and all that needs no faults
	@$(SETUP_TESTS)
	@scripts/lint.sh
	@$(PYTEST) -m "not long and not e2e"
	@# By itself: beside other tests the platform takes twice as long (docs/testing.md).
	@$(PYTHON_BIN) -m pytest -m e2e

test-all: test $(LONG_LANES:%=test-%) ## Run test, then the long lanes (one alone: test-unit, test-dbt, ... test-cluster)

$(LANES:%=test-%): test-%:
	@$(SETUP_TESTS)
	@$(PYTEST) -m $*

mutants: ## Apply tests/mutants one by one and list what no test notices (OPTIONS="--help")
	@$(SETUP_TESTS)
	@$(PYTHON_BIN) -m tests.mutants --jobs 2 $(OPTIONS)

lint: ## Static checks: ruff, mypy, sqlfluff, shellcheck, hadolint, yamllint
	@scripts/setup.sh dev
	@scripts/lint.sh

docs: setup ## Build dbt's documentation as one page, site/dbt.html
	@$(PYTHON_BIN) -m services docs

bench: ## Measure ingestion, dbt, the DAGs, training, serving and the baselines
	@scripts/setup.sh dev
	@$(PYTHON_BIN) -m bench
	@$(PYTHON_BIN) -m bench.training
	@$(PYTHON_BIN) -m bench.serving

load: setup ## Load on the running API by Locust, which logs it: a report, PASS or FAIL (OPTIONS="--help")
	@scripts/setup.sh loadtest
	@$(PYTHON_BIN) -m loadtest $(OPTIONS)

deploy: ## Build the images and bring the platform up on MicroK8s (OPTIONS="--help")
	@scripts/deploy.sh $(OPTIONS)

undeploy: ## Remove what deploy made; data stay (OPTIONS="--help")
	@scripts/cleanup.sh $(OPTIONS)

screenshots: ## Take the pictures of README with headless Chromium
	@scripts/setup.sh dev
	@$(PYTHON_BIN) scripts/screenshots.py

lock: ## Resolve pyproject.toml into requirements/*.txt
	@scripts/setup.sh dev
	@scripts/lock.sh
