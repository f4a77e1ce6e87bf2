# Two commands matter: `make demo` shows what hydragrad does, `make test` checks everything.
# Both build the environment they need in .venv, and rebuild it only when its description changes.

PYTHON  ?= python3
VENV    ?= .venv
WORKERS ?= 2
PEERS   ?= 1

BIN     := $(VENV)/bin
# uv, where there is one, takes seconds for what takes pip minutes; without --no-compile pip would compile all of torch.
ifneq ($(shell command -v uv),)
CREATE  := uv venv --quiet --seed --python $(PYTHON)
INSTALL := uv pip install --quiet --python $(BIN)/python -c constraints.txt
ifneq ($(PIP_FIND_LINKS),)
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
else
CREATE  := $(PYTHON) -m venv
INSTALL := $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt
endif

# Modules are compiled when they are first used, and that is kept: some environments forbid it, and then every process
# of the tests would compile them anew.
unexport PYTHONDONTWRITEBYTECODE

# Where `hydragrad demo` writes when it is not told otherwise.
PICTURES := demo-output

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:  # half an environment is none
ifndef TOGETHER
.NOTPARALLEL:      # one environment at a time, also under -j
endif
.PHONY: help demo test lint types docs tests wheel bench compare paper format clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## run the demo and say where its pictures are
	$(BIN)/hydragrad demo
	@echo; echo "Look at:"; find "$(CURDIR)/$(PICTURES)" -name '*.html' -o -name '*.png' | sort | sed 's/^/  /'

test: $(VENV)/.dev  ## check everything: style, types, documentation, tests
	@$(MAKE) --no-print-directory -j3 TOGETHER=1 lint types docs tests

lint: $(VENV)/.dev  ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## check the types
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.dev  ## build the documentation into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

tests: $(VENV)/.dev  ## run the tests, docstring and documentation examples and the wheel's test included
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

wheel: $(VENV)/.dev  ## build sdist and wheel into dist/, and test a wheel in a clean environment
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m pytest tests/test_wheel.py

bench: $(VENV)/.dev  ## run the benchmarks
	$(BIN)/python -m benchmarks

compare: $(VENV)/.compare  ## compare with other methods and libraries (hours; PEERS=0: without the libraries)
ifneq ($(PEERS),0)
	-$(BIN)/python -m comparison.environments  # a library that cannot be installed is left out
endif
	$(BIN)/python -m comparison $(if $(filter 0,$(PEERS)),--no-peers)
	$(BIN)/python -m comparison.results --add
	$(BIN)/python -m comparison.page

paper: $(VENV)/.dev  ## run the studies behind the tables in the documentation
	$(BIN)/python -m experiments.approximation
	$(BIN)/python -m experiments.ladder
	$(BIN)/python -m experiments.smoothing
	$(BIN)/python -m experiments.mislabels
	$(BIN)/python -m experiments.resnet

format: $(VENV)/.dev  ## mend the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove all that make made: environment, caches, outputs
	rm -rf $(VENV) build dist site $(PICTURES) .pytest_cache .ruff_cache .hypothesis
	find src tests benchmarks comparison docs examples experiments -name __pycache__ -type d -exec rm -rf {} + 2>/dev/null || true

# A stamp stands for "this environment has these extras", so that a second call installs nothing.
$(VENV)/.demo: EXTRAS := demo
$(VENV)/.dev:  EXTRAS := demo,docs,dev
$(VENV)/.compare: EXTRAS := demo,docs,dev,baselines
$(VENV)/.demo $(VENV)/.dev $(VENV)/.compare: $(VENV)/pyvenv.cfg pyproject.toml constraints.txt
	@echo 'Installing hydragrad[$(EXTRAS)] into $(VENV): some minutes the first time, torch is large'
	@$(INSTALL) -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/pyvenv.cfg:
	$(CREATE) $(VENV)
