# Every target makes the environment it needs. Another interpreter gets an environment of its own:
#
#     make test PYTHON=python3.12 VENV=.venv-3.12

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_INSTALLED := $(VENV)/.installed-demo
TEST_INSTALLED := $(VENV)/.installed
INSTALL = $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
DEMO := runs/demo
STAGE := first_stage
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder --durations=10

.PHONY: help demo test test-all lint docs

help:
	@echo 'make demo      train both stages on handwritten digits, sample, measure: $(DEMO)/'
	@echo '               STAGE=gan DEMO=runs/demo_gan: with a discriminator in the first stage'
	@echo 'make test      the tests, without the slow ones'
	@echo 'make test-all  every test'
	@echo 'make lint      ruff: rules and format; mypy: types of the public surface'
	@echo 'make docs      the documentation site: build/site/index.html'
	@echo 'PYTHON=python3.12 selects the interpreter, VENV=.venv-3.12 where its packages go'

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("PYTHON=$(PYTHON) is older than 3.11")'
	$(PYTHON) -m venv $(VENV)

# one environment: what the demo needs, and for tests the rest
$(DEMO_INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing ldm_jax and what the demo needs into $(VENV) ...'
	$(INSTALL) '.[demo]'
	touch $@

$(TEST_INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo 'installing ldm_jax and what its tests need into $(VENV) (torch among it) ...'
	$(INSTALL) '.[demo,test]'
	touch $(DEMO_INSTALLED) $@

demo: $(DEMO_INSTALLED)
	@$(BIN)/python benchmarks/demo_report.py $(DEMO) --targets
	$(BIN)/ldm-train digits:$(STAGE) --workdir $(DEMO)/first_stage
	$(BIN)/ldm-eval reconstruct --model $(DEMO)/first_stage --out $(DEMO)/reconstruct --features random --batch-size 60
	$(BIN)/ldm-train digits --workdir $(DEMO)/ldm --first-stage.path $(DEMO)/first_stage
	$(BIN)/ldm-sample class2img --model $(DEMO)/ldm --out $(DEMO)/samples --num-images 36 --batch-size 60 --npz --overwrite
	$(BIN)/python benchmarks/demo_report.py $(DEMO)
	@echo
	@echo 'Next, sevens and threes, the same in a browser, then a model of your own pictures:'
	@echo '  $(BIN)/ldm-sample class2img --model $(DEMO)/ldm --out $(DEMO)/mine --labels 7 3 --num-images 8'
	@echo "  $(BIN)/python -m pip install '.[web]' && $(BIN)/ldm-web --model $(DEMO)/ldm"
	@echo '  $(BIN)/ldm-train own:first_stage --workdir runs/own_first_stage --data.source.path YOUR_PICTURES'

test: $(TEST_INSTALLED)
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: $(TEST_INSTALLED)
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(TEST_INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.docs: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
