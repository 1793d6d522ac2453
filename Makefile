# Each command does its own set-up, on a machine with Python >= 3.10:
#   make demo    runs the main job, and installs no more than that needs
#   make test    passes the tests, lint and types included; compiles llama.cpp, so a C++ compiler is needed
#   make quick   the inner loop: lint, and the tests that need no export, server or compressed model
# On a machine whose Python already has torch >= 2.8 (a GPU build, say) it is used and never replaced.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# What is installed is compiled where it is first imported (see install.sh), so that must be kept.
export PYTHONDONTWRITEBYTECODE :=
# Two processes with one thread each; a file's tests share what it makes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test quick peers docs lint types unit lock clean

demo: $(VENV)/.demo
	$(BIN)/python -m benchmarks.demo --out build/demo

test: lint types unit

lint: $(VENV)/.installed
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check --quiet .

types: $(VENV)/.installed
	$(BIN)/python -m mypy

unit: $(VENV)/.installed
	$(PYTEST)

quick: lint
	$(PYTEST) --quiet -m "not slow"

$(VENV)/.demo: pyproject.toml constraints.txt install.sh
	@PYTHON=$(PYTHON) sh install.sh $(VENV) demo
	@touch $@

$(VENV)/.installed: $(VENV)/.demo
	@PYTHON=$(PYTHON) sh install.sh $(VENV) all
	@touch $@

# Other projects that read our files or are measured beside us, each in an environment of its own; their tests skip
# where these are missing.
peers: .venv-gptqmodel/.installed .venv-autogptq/.installed .venv-openvino/.installed .venv-clients/.installed .venv-litellm/.installed \
       .venv-vercel/.installed .venv-deploy/.installed .venv-docs/.installed .venv-weights/.installed \
       .venv-vllm/.installed

# A client for Node; without npm its test skips.
.venv-vercel/.installed: tests/peers/vercel.json
	mkdir -p .venv-vercel
	cp tests/peers/vercel.json .venv-vercel/package.json
	if command -v npm > /dev/null; then npm install --prefix .venv-vercel --silent --no-fund --no-audit; fi
	touch $@

.venv-%/.installed: tests/peers/%.txt install_peers.sh
	PYTHON=$(PYTHON) sh install_peers.sh $*
	touch $@

.venv-vllm/.installed: tests/peers/vllm-alone.txt tests/peers/vllm_after.py

# The command reference, from the help texts, and the site, into build/site.
docs: $(VENV)/.installed .venv-docs/.installed
	$(BIN)/python -m docs.commands
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

lock: $(VENV)/.installed
	$(BIN)/python -m pip freeze --exclude safevlm-edge --exclude torch > build/constraints.txt

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
