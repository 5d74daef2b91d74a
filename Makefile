# make demo | eval | test | gpu | lint | help.  Everything is installed into .venv; nothing else on the machine is changed, except that
# `make demo` run by root installs Debian's package of Fashion-MNIST, and python3-venv where it is missing.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO := runs/demo
APT := apt-get -y -qq -o Dpkg::Use-Pty=0 --no-install-recommends install

# about five minutes on two cores
DEMO_FLAGS := --dataset fashion_mnist --augmentation dino --arch resnet8 --width 64 --out_dim 1024 --beta 0.5 \
	--batch_size_per_gpu 128 --lr 4e-3 --warmup_epochs 0.2 --max_steps 600

# what is evaluated, how, and where features are kept for the next evaluation
EVAL_FLAGS := --checkpoint $(DEMO)/checkpoint.pth --precision auto --features_dir $(DEMO)/features --output_dir $(DEMO)

.PHONY: help demo eval test gpu lint format data clean

help: ## show what can be made
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /  make \1\t/'

demo: $(VENV)/.run data ## pretrain on Fashion-MNIST for about five minutes on two cores, evaluate, leave figures in runs/demo
	$(RUN) main_cplearn.py $(DEMO_FLAGS) --output_dir $(DEMO)
	$(RUN) eval_knn.py $(EVAL_FLAGS) --nb_knn 20 --baselines
	@echo "run folder: $(DEMO)"; ls $(DEMO)

eval: $(VENV)/.run data ## after make demo: every evaluation of its checkpoint, with tables and figures in runs/demo
	$(RUN) eval_knn.py $(EVAL_FLAGS)
	$(RUN) eval_linear.py $(EVAL_FLAGS)
	$(RUN) eval_cluster.py $(EVAL_FLAGS) --match_k 10 --gallery --export $(DEMO)/codes.csv
	$(RUN) eval_collapse.py $(EVAL_FLAGS)

test: $(VENV)/.dev data ## install what the tests need and run them, two files at a time
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile

gpu: $(VENV)/.dev ## on a GPU: test the CUDA kernels, then time them beside the other forms of the loss
	$(RUN) -m pytest tests/test_triton_kernels.py tests/test_main_cplearn.py -m "not slow" -k gpu -rs
	$(RUN) -m benchmarks.head --device cuda --num_codes 16384 131072 1048576 --output head_gpu.json --plot head_gpu.png

lint: $(VENV)/.dev ## ruff: style, imports, likely mistakes
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.dev ## let ruff rewrite what lint complains of
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

data: ## Fashion-MNIST from Debian's package where that can be installed; elsewhere torchvision downloads it
	@if [ ! -e /usr/share/datasets/fashion-mnist ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    $(APT) dataset-fashion-mnist >/dev/null 2>&1 || { apt-get -qq update; $(APT) dataset-fashion-mnist >/dev/null; } || true; \
	fi

clean: ## remove .venv and caches; runs stay
	rm -rf $(VENV) .pytest_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); [ "$$(id -u)" = 0 ] && apt-get -qq update && $(APT) python3-venv && $(PYTHON) -m venv $(VENV); }

$(VENV)/.run: requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements.txt | $(VENV)/bin/python
	$(RUN) -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/.run
