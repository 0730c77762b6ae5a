# make demo | install | serve | test | lint | docs | clean.  Needs Python 3.11 or newer and nothing else: everything is installed into .venv.

VENV := .venv
BIN := $(VENV)/bin
PROMPT := a red ball rolls in from the left, then it jumps
SECONDS := 6

# The first Python of these that is new enough, or the one given: make demo PYTHON=/opt/python3.12/bin/python3
PYTHON ?= $(eval PYTHON := $(shell for python in python3.11 python3 python3.12 python3.13 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done))$(PYTHON)

# Where torch comes from. On Linux PyPI's own torch brings gigabytes of CUDA, so the CPU build is taken from here when it
# can be reached; pip prefers it as the higher version (2.13.0+cpu). TORCH_INDEX= (empty) takes torch as pip finds it.
CPU_TORCH := https://download.pytorch.org/whl/cpu
PROBE := import sys, urllib.request as u; \
	sys.platform == "linux" and u.urlopen(u.Request("$(CPU_TORCH)/torch/", method="HEAD"), timeout=3) and print("$(CPU_TORCH)")
TORCH_INDEX ?= $(eval TORCH_INDEX := $(shell $(PYTHON) -c '$(PROBE)' 2>/dev/null))$(TORCH_INDEX)

.PHONY: demo install serve test lint docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/installed
	$(BIN)/dicode generate "$(PROMPT)" --seconds $(SECONDS) -o demo.mp4 --sheet demo.png

# What training, evaluation and the server need beside it; to have `dicode` on the path: source .venv/bin/activate
install: $(VENV)/installed-all

serve: $(VENV)/installed-serve
	$(BIN)/dicode serve

# A file's tests share what they prepare, minutes of it: each file in one process, in alphabetical order.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python tools/figures.py --check
	$(BIN)/python tools/cards.py --check

# The site, build/docs/index.html: docs/, model cards, references from docstrings, flags and OpenAPI. Needs no network.
docs: $(VENV)/installed-dev
	$(BIN)/python tools/site
	$(BIN)/zensical build --clean --strict
	$(BIN)/python tools/site --check

clean:
	rm -rf $(VENV) build dist demo.mp4 demo.json demo.png .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.*' -prune -exec rm -rf {} +

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/python
	$(call install,.)

$(VENV)/installed-serve: pyproject.toml constraints.txt | $(VENV)/python
	$(call install,.[serve])
	@touch $(VENV)/installed

$(VENV)/installed-all: pyproject.toml constraints.txt | $(VENV)/python
	$(call install,.[train$(comma)data$(comma)evaluate$(comma)serve])
	@touch $(VENV)/installed $(VENV)/installed-serve

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/python
	$(call install,.[dev])
	@touch $(VENV)/installed $(VENV)/installed-serve $(VENV)/installed-all

$(VENV)/python:
	@test -n "$(PYTHON)" || { echo "dicode needs Python 3.11 or newer and found $$(python3 --version 2>&1): install one, or" \
		"name it: make demo PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("dicode needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

comma := ,
define install
@echo "installing $(1) into $(VENV), some minutes; torch from $(or $(TORCH_INDEX),where pip looks (of PyPI on Linux: with CUDA, gigabytes))"
@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
	$(addprefix --extra-index-url ,$(TORCH_INDEX)) --editable "$(1)"
@$(BIN)/python -c 'from importlib.metadata import version as v; print("installed: dicode", v("dicode") + ", torch", v("torch"))'
@touch $@
endef
