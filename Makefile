# Two commands: `make pretrain` and `make test`. `make` alone lists everything. GNU make 3.81 or newer.
#
# Both install into .venv first if it isn't there yet, and run no pip command (so need no network) once it is.

# Empty means: decided by scripts/setup_environment.sh, which says how.
PYTHON ?=
TORCH ?=
TORCH_INDEX ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup pretrain check test test-slow bench soak format clean

help:  ## list what make can do
	@echo "make <target>, where <target> is one of"
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  \1@\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F@ '{printf "%-12s %s\n", $$1, $$2}'
	@echo
	@echo "  PYTHON=python3.12     the Python to make .venv with, 3.11 or newer"
	@echo "  TORCH=REQUIREMENT     another build of torch than the pinned default: a pip requirement or a wheel; remembered"
	@echo "  TORCH_INDEX=ADDRESS   where pip finds that build: the address that PyTorch's installation page gives; remembered"
	@echo "  ARGS=\"--seed 1\"       more flags: for pretrain those of \`ijepa-hf pretrain\`, for test those of pytest"
	@echo
	@echo "Examples"
	@echo "  make pretrain ARGS=\"--seed 1 --output_dir runs/digits-seed1\""
	@echo "  make setup TORCH=torch==2.13.0+cu130 TORCH_INDEX=ADDRESS"
	@echo "  make test ARGS=\"tests/model/test_masking.py -k rectangles\""

setup:  ## make .venv with the pinned packages and this one; does nothing when that is done already
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' TORCH_INDEX='$(TORCH_INDEX)' sh scripts/setup_environment.sh

pretrain: setup  ## pretrain on scikit-learn's digits into runs/digits; goes on after an interruption, or prints the finished run's report
	@$(BIN)/ijepa-hf pretrain digits --output_dir runs/digits --resume_from_checkpoint latest $(ARGS)

# Two workers for two cores, each with one thread: more threads only compete. A file stays with one worker, so that what
# its tests share is made once; tests/conftest.py puts the long files first.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

CHECK := $(BIN)/python -m ruff format --check . && $(BIN)/python -m ruff check . && $(BIN)/python -m mypy

check: setup  ## check format, lint and types
	$(CHECK)

# The check runs beside the tests and is printed after them. It is no second make, which `make -n` would start.
test: setup  ## run the tests, except those marked slow, and beside them the check of format, lint and types
	@log=`mktemp`; { $(CHECK); } >$$log 2>&1 & check=$$!; \
	trap 'kill $$check 2>/dev/null; rm -f $$log' EXIT; trap 'exit 130' INT TERM; \
	$(PYTEST) $(ARGS); tests=$$?; wait $$check; checked=$$?; cat $$log; \
	if [ $$checked -ne 0 ]; then echo 'make check: failed, see above' >&2; exit $$checked; fi; exit $$tests

test-slow: setup  ## run the tests marked slow, and the properties on many examples (hours on a small machine)
	$(PYTEST) -m "slow or property" $(ARGS)

bench: setup  ## speed and memory beside other code, one table; a quarter of an hour on a quiet machine (ARGS=--quick: 2 min)
	$(BIN)/python benchmarks/speed.py $(ARGS)

soak: setup  ## runs under faults drawn at random, three quarters of an hour: is anything lost? (ARGS="--minutes 5": shorter)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/soak.py $(ARGS)

format: setup  ## format the code and mend what the linter can mend by itself
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .

clean:  ## remove .venv, caches and build leftovers; runs/ stays
	rm -rf $(VENV) .venv-unfinished build dist src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
