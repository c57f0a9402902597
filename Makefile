SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types bench sim sim-faults versions scale takeover recovery resume chaos drills docs clean

python := .venv/bin/python
# Two workers fit the two cores that the suite is timed on; every file's tests stay on one worker.
workers ?= 2
# Extra arguments for pytest, the demo or the benchmarks: make test args="-k fence"
args ?=

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make .venv and install the pinned versions (quick the second time)
	@.ci/setup

demo: setup ## Two tenants, three nodes, a real model, one node killed on the way
	@$(python) -m demo $(args)

test: lint types ## Lint, types, layers and all tests
	@$(python) -m pytest -n $(workers) --dist loadfile $(args)

lint: setup ## Style (ruff) and layers (import-linter)
	@.venv/bin/ruff check --quiet .
	@out=$$(.venv/bin/ruff format --check . 2>&1) || { echo "$$out"; exit 1; }
	@out=$$(.venv/bin/lint-imports --no-logo 2>&1) || { echo "$$out"; exit 1; }

types: setup ## Types (mypy, strict)
	@.venv/bin/mypy --no-error-summary

bench: setup ## Benchmarks beside the raw broker loop and Ray; lines in out/bench.jsonl, a table at the end
	@$(python) -c 'import ray' 2>/dev/null || $(python) -m pip --quiet --quiet --disable-pip-version-check install -r bench/requirements.txt
	@$(python) -m bench $(args)

sim: setup ## The production scheduler against others in a simulator; lines in out/sim.jsonl, plots, a table at the end
	@$(python) -m flowmesh_scheduler.sim --full --seeds 20 --out out $(args)

versions: setup ## This build and the previous release in one mesh, every combination; lines in out/versions.jsonl
	@$(python) -m tests.versions $(args)

scale: setup ## 1,500 simulated nodes on one broker; lines in out/scale.jsonl, a table at the end
	@$(python) -m bench.scale $(args)

takeover: setup ## A scheduler takes over 100,000 outstanding operators; lines in out/takeover.jsonl
	@$(python) -m bench.takeover $(args)

recovery: setup ## What killed nodes and an absent broker cost, beside the raw loop; lines in out/recovery.jsonl
	@$(python) -m bench.recovery $(args)

resume: setup ## What a killed node costs a training; lines in out/resume.jsonl
	@$(python) -m bench.resume $(args)

# One seed alone with SEED=n, for MINUTES; else SEEDS of them share MINUTES, AT_ONCE side by side, after the drills.
SEED ?=
SEEDS ?= 20
MINUTES ?= 60
AT_ONCE ?= 1
chaos: setup ## Real processes killed, paused, cut off, filled up; drills first; lines in out/chaos.jsonl, docs/fault-report.md
	@$(python) -m chaos --minutes $(MINUTES) --at-once $(AT_ONCE) $(if $(SEED),--seeds 1 --seed $(SEED),--seeds $(SEEDS)) $(args)

drills: setup ## The fail-over drills alone, timed: leaders, nodes, brokers, a wiped store
	@$(python) -m chaos.drills $(args)

sim-faults: setup ## The production code under seeded faults on virtual time; lines in out/sim-faults.jsonl, histories of what failed
	@$(python) -m tests.faults --seeds 1000 --minutes 10 --processes 2 $(args)

docs: setup ## Write anew the pages of docs/ that are made from the code
	@$(python) -m flowmesh_mesh.schema && $(python) -m flowmesh_mesh.reference

clean: ## Remove what builds, tests and runs leave behind; .venv stays
	@rm -rf build dist out .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
