# make demo: set up and run the main job.   make test: set up and pass the tests.   Each works without the other.
PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= .venv-extras
BIN    := $(VENV)/bin
TORCH  := torch==2.13.0
export HF_HUB_OFFLINE = 1
export TRANSFORMERS_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test quick docs lint types test-extras test-robosuite bench clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: a bare "torch" in a resolver run would pull gigabytes of CUDA packages
$(VENV)/.core: setup.cfg constraints.txt | $(BIN)/python
	$(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q -e ".[audio]" -c constraints.txt
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(BIN)/pip install -q -e ".[audio,robotics,pusht,bench,serve,docs,dev]" -c constraints.txt
	touch $@

demo: $(VENV)/.core
	$(BIN)/gencontrol finetune --config demo.toml --output runs/demo
	@echo "Open runs/demo/report.html to hear base and tuned sound side by side."

test: $(VENV)/.dev lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

QUICK := tests/process tests/docs tests/examples tests/data tests/kernels tests/test_imports.py tests/test_readme.py \
  tests/cli/test_options.py tests/cli/test_boundary.py tests/jobs/test_prompts.py tests/jobs/test_settings.py \
  tests/train/test_health.py tests/train/test_tracking.py tests/train/test_contract_toy.py tests/faults/test_folder.py \
  tests/rewards/test_rewards_base.py tests/algorithms/test_advantages.py tests/algorithms/test_crd_losses.py \
  tests/algorithms/test_dragon_losses.py tests/models/test_exact.py tests/models/test_denoiser.py \
  tests/sampling/test_guidance.py tests/sampling/test_loop.py \
  tests/sampling/test_keyed.py tests/sampling/test_steps.py

# the tests of a minute, the core of each room; those that take longer are marked slow (setup.cfg lists the marks)
quick: $(VENV)/.dev lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(QUICK)

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build --strict
	@echo "Open build/docs/index.html, or serve it: $(BIN)/python -m http.server -d build/docs"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy --config-file setup.cfg -p gencontrol

# extras that cannot share an environment with NumPy 2, and those that bring torchvision
test-extras: constraints-numpy1.txt
	$(PYTHON) -m venv $(EXTRAS)
	$(EXTRAS)/bin/pip install -q $(TORCH) "numpy<2"
	$(EXTRAS)/bin/pip install -q -e ".[audio,clap,image,dev]" -c constraints-numpy1.txt
	$(EXTRAS)/bin/python -m pytest -m extras tests/extras

# the real robosuite, whose numba needs NumPy 1
test-robosuite: constraints-numpy1.txt
	$(PYTHON) -m venv $(EXTRAS)-robosuite
	$(EXTRAS)-robosuite/bin/pip install -q $(TORCH) "numpy<2"
	$(EXTRAS)-robosuite/bin/pip install -q -e ".[dev]" "robosuite>=1.5,<1.6" -c constraints-numpy1.txt
	$(EXTRAS)-robosuite/bin/python -m pytest -m extras tests/extras/test_robosuite.py

bench: $(VENV)/.dev
	$(BIN)/gencontrol bench dragon --output runs/bench

clean:
	rm -rf build dist *.egg-info runs
