# Thin on purpose: every target calls a script or a package.
.DEFAULT_GOAL := help
.PHONY: help setup run up down test lint docs bench load deploy undeploy screenshots lock

PYTHON_BIN := .venv/bin/python
PLATFORM_TEST := tests/e2e/test_make_run.py

help: ## Show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup:
	@scripts/setup.sh

run: setup ## Set up, start all services, bring raw data to a champion, show the result
	@$(PYTHON_BIN) -m services run

up: setup ## Start all services, and nothing more
	@$(PYTHON_BIN) -m services up

down: setup ## Stop everything that run or up started; data stay
	@$(PYTHON_BIN) -m services down

test: ## Set up and run lint and all tests
	@scripts/setup.sh dev
	@scripts/setup.sh policy
	@scripts/lint.sh
	@# Two lanes for two cores. A whole platform takes both by itself, and comes after.
	@$(PYTHON_BIN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore $(PLATFORM_TEST)
	@$(PYTHON_BIN) -m pytest $(PLATFORM_TEST)

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
