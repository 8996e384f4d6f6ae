# Two commands do everything: `make demo` shows what this project is for, `make test` checks it.
# Both set up what is missing, and only what is missing.

PYTHON ?= python3
DOCKER ?= docker
IMAGE  ?= rebirth-caffe

VENV   := .venv
CAFFE  := .caffe
PY     := $(VENV)/bin/python
# Twice quiet: errors are shown, advice about the machine's own configuration is not.
PIP    := $(PY) -m pip install -qq --disable-pip-version-check
# Empty files that say a step was finished; what was interrupted has none and is done again.
TOOLS_READY := $(VENV)/requirements.stamp
DEV_READY   := $(VENV)/requirements-dev.stamp
CAFFE_READY := $(CAFFE)/installed.stamp

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test lint proto image image-check clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{ printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.x chooses the Python (3.10 or newer) that .venv/ is made from"

demo: $(TOOLS_READY) $(CAFFE_READY) ## a net reborn, retrained and timed against its original; GoogLeNet's and CaffeNet's speed
	@$(PY) tools/demo.py

test: setup ## everything: ruff, mypy and the test suite, with real Caffe
	@$(MAKE) --no-print-directory lint
	$(PY) -m pytest -n 2

lint: $(DEV_READY) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

setup: $(DEV_READY) $(CAFFE_READY) ## .venv/ with all requirements, .caffe/ with Caffe 1.0 (demo and test do this)
	@echo "Ready: $(PY) and $(CAFFE)/bin/caffe"

proto: $(DEV_READY) ## regenerate caffe_pb2.py from schema/caffe.proto
	cd rebirth_caffe/schema && ../../$(PY) -m grpc_tools.protoc -I. --python_out=. --pyi_out=. caffe.proto

image: ## the Docker image
	$(DOCKER) build --tag $(IMAGE) .

image-check: ## build the image without a Docker engine and use it as an ordinary user (wants root)
	tools/image_check.sh

clean: ## remove .venv/, .caffe/ and what the tools left
	rm -rf $(VENV) $(CAFFE) $(CAFFE).install_caffe.tmp demo .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(TOOLS_READY): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	    echo "error: '$(PYTHON)' is not Python 3.10 or newer: make PYTHON=/path/to/a/newer/python3" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "error: '$(PYTHON)' cannot make virtual environments: sudo apt-get install python3-venv" >&2; exit 2; }
	@echo "Setting up $(VENV)/ with what the tools need"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) --requirement requirements.txt
	@touch $@

$(DEV_READY): requirements-dev.txt requirements-torch.txt $(TOOLS_READY)
	@echo "Adding what the tests need"
	@$(PIP) --requirement requirements-dev.txt
	@touch $@

# The script looks for itself whether Caffe is there and works; it is asked again when it has changed.
$(CAFFE_READY): tools/install_caffe.sh
	@tools/install_caffe.sh $(CAFFE)
	@touch $@
