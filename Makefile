# Every target sets up what it needs, once: `make test` in a fresh clone is enough.
#   PYTHON=python3.12   the interpreter to make the environment with
#   STACK=torch2.11     the second pinned set, in an environment of its own; STACK=onedl: the maintained forks
#   ARGS='-k spec'      more arguments for the command that a target runs

STACK ?= torch2.14
PYTHON ?=
ARGS ?=
WORKERS ?= 2

SUFFIX := $(if $(filter torch2.14,$(STACK)),,-$(STACK))
VENV := .venv$(SUFFIX)
OPS_VENV := .venv-ops$(SUFFIX)
LAUNCHER := $(firstword $(foreach name,python3 python $(PYTHON),$(if $(shell command -v $(name) 2>/dev/null),$(name))))
CREATE := $(or $(LAUNCHER),python3) -I -S tools/env/create.py --stack '$(STACK)' --python '$(PYTHON)'

# Python keeps the byte code of what it imports, also where the caller's environment forbids it: without,
# every process of the tests compiles PyTorch's and mmdet's sources again, half of the time that it takes.
unexport PYTHONDONTWRITEBYTECODE

# Two test processes on two cores leave one thread for each. Files in their order: xdist would put those with
# the fewest tests last, which are the ones that train, and one process would wait for the other.
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
ONE_THREAD := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}

.PHONY: help env demo test test-slow ops test-ops bench docs lint lock clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / && $$1 != "help" { printf "  make %-10s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=python3.12 picks the interpreter, STACK=torch2.11 the second pinned set, STACK=onedl the forks."

env:  ## create or refresh the environment
	@$(CREATE) --env $(VENV)

demo: env  ## the main job on generated data: KITTI labels to an annotated picture and a checked ONNX file
	$(VENV)/bin/python projects/shapes/demo.py $(ARGS)

test: env  ## the default test suite
	$(ONE_THREAD) $(VENV)/bin/python $(PYTEST) $(ARGS)

test-slow: env  ## the long tests: kills at random moments, searches for damaged files, full disks, long runs
	$(ONE_THREAD) $(VENV)/bin/python $(PYTEST) -m slow $(ARGS)

ops:  ## a second environment with full mmcv and its compiled ops
	@$(CREATE) --env $(OPS_VENV)
	@test -e $(OPS_VENV)/.has-ops || { $(OPS_VENV)/bin/ddetr-mm install-ops && touch $(OPS_VENV)/.has-ops; }

test-ops: ops  ## the tests that need mmcv's compiled ops
	$(ONE_THREAD) $(OPS_VENV)/bin/python $(PYTEST) -m full_ops $(ARGS)

bench: env  ## the benchmarks
	$(VENV)/bin/python benchmarks/run.py $(ARGS)

docs: env  ## the documentation as a site: build/docs/index.html
	$(VENV)/bin/python -m sphinx -b html -q -W --keep-going -c docs . build/docs $(ARGS)

lint: env  ## ruff, mypy and an audit of the dependencies
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python tools/audit.py

lock:  ## resolve the pinned sets anew (ARGS=--upgrade for the newest versions)
	sh tools/env/lock.sh $(ARGS)

clean:  ## remove what the other targets made; the environments stay
	rm -rf build dist *.egg-info demo_results work_dirs results
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find ddetr_mm tests tools projects benchmarks configs -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
