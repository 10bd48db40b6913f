# `make demo` and `make test` do all their own set-up; `make help` lists the rest.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export TORCH_EXTENSIONS_DIR ?= $(CURDIR)/.cache/torch_extensions
export HF_HUB_OFFLINE ?= 1
OUT ?= out/demo
PYTEST = $(BIN)/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder

.PHONY: help demo test test-quick nightly check docs setup clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: setup ## synthetic shards -> a tiny A-CLIP and its control trained by DeepSpeed -> accuracy and pictures in OUT
	@$(BIN)/amclip demo --out $(OUT) --setup-seconds $$(cat .cache/setup-seconds)

test: setup ## every test but the nightly matrices
	$(PYTEST) -m "not nightly and not gpu"

test-quick: setup ## the unit tests, a distributed one of every stage and a training, in minutes
	$(PYTEST) -m "quick and not nightly and not gpu"

nightly: setup ## the full matrices (hours); installs torchao, for engine.fp8
	$(BIN)/python -m pip install -q -c constraints.txt torchao
	$(PYTEST) -m "nightly"

check: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup ## the documentation as a site, in out/site: offline, and a warning ends it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "out/site/index.html (with its search: $(BIN)/python -m http.server -d out/site)"

setup: .cache/setup-seconds ## the virtual environment, the pinned packages

.cache/setup-seconds: pyproject.toml constraints.txt setup.py $(wildcard environment/*)
	@mkdir -p .cache
	@bash .ci/setup.sh "$(PYTHON)" "$(VENV)"

clean: ## removes the environment and what was built
	rm -rf $(VENV) .cache out
