# Everything runs in .venv, which `make env` builds from pinned packages. Nothing is installed outside this folder, but
# for the run on Slurm, which as root takes Debian's slurm-wlm and munge (`make test`, `make test-slurm`).

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
    $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PINS := tools/constraints-cpu.txt
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.ready-bench
SEED ?= 0
SEEDS ?= 0 1 2
COMPARISON ?= configs/compare/two_branch.yaml
JOBS ?= 2
# One more than the cores of a small machine: a run that starts or is evaluated leaves cores to the others.
RANKS ?= 3
FAULTS ?= 20
GIGABYTES ?= 1 4 12
REPEATS ?= 2
KERNELS_JSON ?= docs/benchmarks/kernels_cpu.json

# One thread per process: several processes share the cores, and more threads than cores cost far more than they give.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help env test test-slow test-slurm test-all compile-gate lint demo compare layouts bench bench-growth bench-merge \
    bench-export bench-engine bench-kernels chaos plan clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: $(READY) ## create .venv with the pinned packages (again only if they changed)

# torch first, so that nothing else chooses its build; what would exchange it, or brings gigabytes for CUDA, last and
# without its own requirements.
ALONE := torchvision sglang xgrammar llguidance outlines
$(READY): pyproject.toml $(PINS)
	@test -n "$(PYTHON)" || { echo "make env: no Python 3.11 or newer found; install it or give PYTHON=/path/to/python"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $$(grep '^torch==' $(PINS))
	$(BIN)/pip install --quiet --editable '.[dev,serve-cpu]' --constraint $(PINS)
	$(BIN)/pip install --quiet --no-deps $(foreach name,$(ALONE),$$(grep '^$(name)==' $(PINS)))
	touch $@

$(BENCH_READY): $(READY)
	$(BIN)/pip install --quiet --editable '.[bench]' --constraint $(PINS)
	touch $@

# Last, two runs on a real Slurm: left out, with the reason, where that cannot be had.
INSTALL_SLURM := { command -v slurmctld && command -v munged; } > /dev/null || { apt-get update -qq && \
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge > /dev/null; }
test: env compile-gate ## all fast tests, the kernels' compile gate, and runs on Slurm (as root: installs slurm-wlm, munge)
	$(BIN)/pytest -m "not slow and not slurm" -n $(JOBS) --dist loadfile --durations=15
	-@$(INSTALL_SLURM)
	$(BIN)/pytest -m "slurm and not slow" tests/run/test_slurm_run.py

compile-gate: env ## compile every kernel for sm_90 and sm_100; registers, shared memory and spills as in the table
	$(BIN)/python -m copd_kernels.resources --jobs $(JOBS)

test-slow: env ## the slow tests
	$(BIN)/pytest -m slow

test-slurm: env ## runs on a real Slurm of two nodes, started here (as root; installs Debian's slurm-wlm and munge)
	$(INSTALL_SLURM)
	COPD_SLURM=required $(BIN)/pytest -m "slurm and not slow" tests/run/test_slurm_run.py --durations=5

test-all: test test-slow ## every test

lint: env ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: env ## two branches co-evolve on the mini suite (SEED=0)
	$(BIN)/python tools/mini_base.py --seed $(SEED)
	$(BIN)/copd train configs/mini/text_image.yaml seed=$(SEED)

compare: env ## methods side by side on the mini suite (SEEDS="0 1 2", COMPARISON=configs/compare/two_branch.yaml)
	for seed in $(SEEDS); do $(BIN)/python tools/mini_base.py --seed $$seed $(foreach kind,video conflict,$(if $(findstring $(kind),$(COMPARISON)),--$(kind))) || exit 1; done
	$(BIN)/copd compare $(COMPARISON) --seeds $(shell echo $(SEEDS) | tr ' ' ',') --ranks $(RANKS)

layouts: env ## every parallel layout beside one process
	$(BIN)/python tools/layouts.py

bench: $(BENCH_READY) ## time of a step beside TRL's, and of an update beside transformers'
	$(BIN)/python tools/bench_step.py --out docs/benchmarks/bench_step.json
	$(BIN)/python tools/bench_reference.py --json docs/benchmarks/bench_reference.json --limit 1.1

bench-growth: env ## tokens per second and memory by processes and by length
	$(BIN)/python tools/bench_growth.py --json docs/benchmarks/growth.json --doc docs/performance.md

bench-merge: env ## merging beside mergekit, and beside what the disk costs (GIGABYTES="1 4 12")
	$(BIN)/python tools/bench_merge.py --gigabytes $(GIGABYTES) --repeats $(REPEATS) --json docs/benchmarks/merge.json --doc docs/performance.md

bench-export: env ## handing a live policy's weights to its engine: rate, and memory on each rank
	$(BIN)/python tools/bench_export.py --json docs/benchmarks/export.json --doc docs/performance.md

bench-engine: env ## SGLang's engine beside the embedded one
	$(BIN)/python tools/bench_engine.py --json docs/benchmarks/engine.json --doc docs/sglang.md

bench-kernels: env ## kernels: time on a GPU, peak memory on a CPU (KERNELS_JSON=FILE)
	$(BIN)/python -m copd_kernels.benchmarks --json $(KERNELS_JSON)

chaos: env ## random faults in real runs; their table goes into docs/reliability.md (FAULTS=20, SEED=0; root for some of them)
	PYTHONPATH=tests/run $(BIN)/python tools/chaos.py --seed $(SEED) --faults $(FAULTS) --json docs/benchmarks/chaos.json --doc docs/reliability.md

plan: env ## plans of the shipped configurations, simulated scaling, and the plan's memory beside torch's own count
	$(BIN)/python tools/plan_tables.py --doc docs/scale.md --json docs/benchmarks/scale.json

clean: ## remove .venv and caches; runs/ is kept
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
