# make demo | eval | test | gpu | lint | help.  Everything is installed into .venv; nothing else on the machine is changed, except that
# `make demo` run by root installs Debian's package of Fashion-MNIST, and python3-venv where it is missing.
# RUN=python3 uses that Python as it is and installs nothing; PYTHON=python3.13 makes .venv with that Python.

PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
RUN := $(VENV)/bin/python
ifeq ($(MAKECMDGOALS),gpu)  # the Python that sees a GPU already, where there is one
RUN := $(shell $(PYTHON) -c "import torch; print('$(PYTHON)' if torch.cuda.is_available() else '$(RUN)')" 2>/dev/null || echo $(RUN))
endif
HAS_RUN := $(if $(filter $(VENV)/%,$(RUN)),$(VENV)/.run)
HAS_DEV := $(if $(filter $(VENV)/%,$(RUN)),$(VENV)/.dev)
PIP_INSTALL := -m pip install -q --disable-pip-version-check
DEMO := runs/demo
APT := apt-get -y -qq -o Dpkg::Use-Pty=0 --no-install-recommends install

# about five minutes on two cores; experiments/demo.toml has the same from three seeds
DEMO_FLAGS := --dataset fashion_mnist --augmentation dino --global_crops_scale 0.7 1 --arch resnet10t --out_dim 1024 \
	--beta 0.5 --batch_size_per_gpu 128 --lr 6e-3 --warmup_epochs 0.2 --max_steps 1400

# what is evaluated, how, and where features are kept for the next evaluation
EVAL_FLAGS := --checkpoint $(DEMO)/checkpoint.pth --precision auto --features_dir $(DEMO)/features --output_dir $(DEMO)

.PHONY: help demo eval test oldest gpu lint format data clean

help: ## show what can be made
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/'

demo: $(HAS_RUN) data ## pretrain on Fashion-MNIST for about five minutes on two cores, evaluate, leave figures in runs/demo
	$(RUN) main_cplearn.py $(DEMO_FLAGS) --output_dir $(DEMO)
	$(RUN) eval_knn.py $(EVAL_FLAGS) --nb_knn 20 --baselines
	$(RUN) eval_linear.py $(EVAL_FLAGS) --protocol few --baselines
	$(RUN) eval_linear.py $(EVAL_FLAGS) --baselines
	$(RUN) eval_cluster.py $(EVAL_FLAGS) --baselines
	@echo "run folder: $(DEMO)"; ls $(DEMO)
	@$(RUN) -m evaluation.summary $(DEMO)
	@$(RUN) make_report.py $(DEMO) --output $(DEMO)/report.html

eval: $(HAS_RUN) data ## after make demo: every evaluation of its checkpoint, with tables and figures in runs/demo
	$(RUN) eval_knn.py $(EVAL_FLAGS)
	$(RUN) eval_linear.py $(EVAL_FLAGS)
	$(RUN) eval_cluster.py $(EVAL_FLAGS) --match_k 10 --gallery --export $(DEMO)/codes.csv
	$(RUN) eval_collapse.py $(EVAL_FLAGS)
	@$(RUN) make_report.py $(DEMO) --output $(DEMO)/report.html

test: $(HAS_DEV) data ## install what the tests need and run them, two files at a time
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

oldest: $(OLDEST)/.dev data ## the tests once more, on the oldest versions that requirements.txt allows
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist loadfile

gpu: $(HAS_DEV) ## on a GPU: test what runs there, then time the step and the forms of the loss
	$(RUN) -m pytest -n auto --maxprocesses 12 -m "not slow" -k gpu -rs tests/gpu tests/test_triton_kernels.py tests/test_augmentation.py
	$(RUN) -m benchmarks.step --device cuda --output step_gpu.json
	$(RUN) -m benchmarks.head --device cuda --num_codes 16384 131072 1048576 --output head_gpu.json --plot head_gpu.png

lint: $(HAS_DEV) ## ruff: style, imports, likely mistakes
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(HAS_DEV) ## let ruff rewrite what lint complains of
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

data: ## Fashion-MNIST from Debian's package where that can be installed; elsewhere torchvision downloads it
	@if [ ! -e /usr/share/datasets/fashion-mnist ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    $(APT) dataset-fashion-mnist >/dev/null 2>&1 || { apt-get -qq update; $(APT) dataset-fashion-mnist >/dev/null; } || true; \
	fi

clean: ## remove .venv, .venv-oldest and caches; runs stay
	rm -rf $(VENV) $(OLDEST) .pytest_cache .ruff_cache

$(VENV)/bin/python $(OLDEST)/bin/python: %/bin/python:
	$(PYTHON) -m venv $* || { rm -rf $*; [ "$$(id -u)" = 0 ] && apt-get -qq update && $(APT) python3-venv && $(PYTHON) -m venv $*; }

$(VENV)/.run: requirements.txt constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) -r requirements.txt -c constraints.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements.txt constraints.txt | $(VENV)/bin/python
	$(VENV)/bin/python $(PIP_INSTALL) -r requirements-dev.txt -c constraints.txt
	@touch $@ $(VENV)/.run

$(OLDEST)/.dev: requirements-dev.txt requirements.txt constraints-oldest.txt | $(OLDEST)/bin/python
	$(OLDEST)/bin/python $(PIP_INSTALL) -r requirements-dev.txt -c constraints-oldest.txt
	@touch $@
