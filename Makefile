# Everything a fresh machine needs: Python 3.10 or newer, and make.
#   make demo    compare AdamW, Muon, GaLore and Fira on a small language model, draw the losses
#   make memory-demo  count the memory of float32 AdamW and of bfloat16 GaLore with step_in_backward
#   make fsdp-demo  train with FSDP2 on 2 processes, resume on 1 and 3, compare with plain tensors
#   make trainers  run the recipes of examples/trainers and the tests that need their packages
#   make test    run the whole test suite
#   make docs    build the site into build/site; every warning is an error
#   make lint    ruff and mypy
#   make package  build wheel and source distribution, install both into an empty environment
#   make bench   time every optimizer against its limit and its peers
#   make gpu-check  on a GPU, with the torch and triton of PYTHON: is all right, and fast enough
# TORCH chooses the torch to install, for example TORCH=torch==2.13.0.

PYTHON ?= python3
TORCH ?= torch
VENV ?= .venv
OUT ?= runs/demo

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Trainers bring packages that the rest of the project must do without
TRAINERS ?= .venv-trainers
DOCS ?= .venv-docs
TRAINER_PIP = $(TRAINERS)/bin/python -m pip install --quiet --disable-pip-version-check
DOCS_NEED := 'mkdocs<2' 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.27' ruff

.PHONY: demo memory-demo fsdp-demo trainers docs test lint package bench gpu-check clean typing FORCE

demo: $(VENV)/.examples
	$(BIN)/python examples/pretrain.py --compare adamw,muon,galore,fira --out $(OUT)

memory-demo: $(VENV)/.examples
	$(BIN)/python examples/memory.py --out runs/memory

fsdp-demo: $(VENV)/.examples
	$(BIN)/python examples/fsdp.py --demo --out runs/fsdp

trainers: $(TRAINERS)/.trainers
	$(TRAINERS)/bin/python examples/trainers/run.py
	$(TRAINERS)/bin/pytest -q -n 2 -rs tests/lora tests/roles tests/bench/test_lora_example.py \
		tests/bench/test_trainers.py \
		-k 'peft or takes_the_optimizer or are_the_real or timm_recipe'

test: $(VENV)/.test
	$(BIN)/pytest -q -n 2 --dist worksteal -rsfE

lint: $(VENV)/.test typing
	$(BIN)/ruff check .
	$(BIN)/mypy

# pictures are drawn with the code of the package, pages are read without importing it
docs: $(DOCS)/.docs $(VENV)/.examples typing
	$(BIN)/python docs/pictures.py --out docs/pictures
	$(BIN)/python examples/tour.py --out docs/pictures
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --clean

package:
	PYTHON='$(PYTHON)' .ci/package '$(TORCH)'

bench: $(VENV)/.examples
	$(BIN)/python bench/run.py --out runs/bench

gpu-check:
	$(PYTHON) bench/gpu.py --out runs/gpu

clean:
	rm -rf build dist *.egg-info runs

# torch goes in before the package, so that the package takes the one that was asked for. The stamp
# changes only with TORCH, and what is built on it follows.
$(VENV)/.torch: FORCE | $(BIN)/python
	@echo '$(TORCH)' | cmp -s - $@ || { $(PIP) '$(TORCH)' && echo '$(TORCH)' > $@; }

$(VENV)/.examples: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[examples]'
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[examples,test]'
	touch $@

$(DOCS)/.docs: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check $(DOCS_NEED)
	touch $@

# A recipe whose packages cannot be had says so and is left out. timm asks for torchvision, which has
# to fit torch, so it comes alone.
$(TRAINERS)/.trainers: pyproject.toml
	$(PYTHON) -m venv $(TRAINERS)
	$(TRAINER_PIP) '$(TORCH)'
	$(TRAINER_PIP) -e '.[trainers,test]' || $(TRAINER_PIP) -e '.[test]'
	$(TRAINER_PIP) --no-deps timm pillow || echo 'timm could not be installed'
	touch $@

FORCE:

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip

# mypy cannot follow the editable install, so it reads the sources through two links
typing:
	mkdir -p build/typing/stiefel
	ln -sfn ../../../optimizers ../../../kernels build/typing/stiefel/
