# The README's commands. Each sets up what it needs by itself: a virtual environment, the compiled operator, the packages.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
# Packages come in the tested versions; EXTRA takes further pip options (--config-settings=cmake.define.DCNV4_CUDA=OFF, for example).
EXTRA ?=
# What pip says is shown where it fails, and not else: under --quiet it keeps to itself which packages conflict.
PIP_LOG = $(VENV)/pip.log
define install
	$(info pip install $(1))
	@$(RUN) -m pip install --disable-pip-version-check -c constraints.txt $(1) > $(PIP_LOG) 2>&1 || \
	  { tail -n 40 $(PIP_LOG); echo "error: pip failed, for the reason above; the whole of what it said is in $(PIP_LOG)"; exit 2; }
endef
# OpenMP threads that wait for others spin for some microseconds only (GNU's default is many times as long): on a machine that
# does something else besides, spinning takes the cores from those waited for.
export GOMP_SPINCOUNT ?= 20000
NATIVE := CMakeLists.txt $(wildcard dcnv4_ext/csrc/*.h dcnv4_ext/csrc/cpu/* dcnv4_ext/csrc/cuda/*)

.PHONY: help demo compare study ablations report test gpu lint format clean

help:
	@echo "make demo     train a DCNv4 latent diffusion model on handwritten digits, draw a grid, print its scores"
	@echo "make compare  train the U-Net baseline as well, print both side by side"
	@echo "make study    train and score the digits study again, into runs/digits, over an hour; make ablations the ablations"
	@echo "make report   one page of the committed results, those of benchmarks/results"
	@echo "make test     run the tests"
	@echo "make gpu      on a machine with a GPU: build, test, sanitize and measure the operator, in under 9 minutes"
	@echo "make lint     check style (ruff, clang-format); make format mends it"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) is older than Python 3.10; name a newer one: make PYTHON=python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv"; exit 2; }

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt $(NATIVE)
	@command -v $${CXX:-c++} >/dev/null || { echo "error: no C++ compiler; on Debian: apt-get install g++"; exit 2; }
	@echo "installing packages and compiling the operator: some minutes"
	@case '$(EXTRA)' in *DCNV4_CUDA=OFF*) exit;; esac; ! PATH="$$CUDA_HOME/bin:$$CUDA_PATH/bin:$$PATH:/usr/local/cuda/bin" command -v nvcc >/dev/null || echo "nvcc is here, so the CUDA kernels are compiled too, many minutes on few cores; to leave them out:" \
	  "make EXTRA=--config-settings=cmake.define.DCNV4_CUDA=OFF"
	$(call install,-e . $(EXTRA))
	$(RUN) -m dcnv4_ext
	@touch $@

# With what the tests need besides; nothing is compiled again.
$(VENV)/testable: $(VENV)/installed
	$(call install,-e '.[test]' $(EXTRA))
	@touch $@

demo: $(VENV)/installed
	$(RUN) train.py configs/digits_dcn.yaml
	$(RUN) sample.py runs/digits_dcn --guidance 1.5 --steps 20 --grid runs/digits_dcn/grid.png
	$(RUN) -m eval.fid runs/digits_dcn --guidance 1.0 1.5 --steps 20
	@echo "The grid: runs/digits_dcn/grid.png"

compare: demo
	$(RUN) train.py configs/digits_unet.yaml
	$(RUN) sample.py runs/digits_unet --guidance 1.5 --steps 20 --grid runs/digits_unet/grid.png
	$(RUN) -m eval.fid runs/digits_dcn runs/digits_unet --guidance 1.0 1.5 --steps 20 --json runs/digits_compare.json
	$(RUN) -m eval.throughput configs/digits_dcn.yaml --baseline configs/digits_unet.yaml --json runs/digits_throughput.json

# Measured again, below runs/; the same command goes on where it was stopped. What is committed in benchmarks/results stays: there
# everything is done already, and a new file is copied over it on purpose.
study: $(VENV)/installed
	$(RUN) -m eval.study configs/studies/digits.yaml --json runs/digits/study.json

ablations: $(VENV)/installed
	$(RUN) -m eval.study configs/studies/ablations.yaml --rounds 0 --json runs/ablations/study.json
	$(RUN) -m eval.ablations --device cpu --json runs/ablations/speed.json

# Of the committed results.
report: $(VENV)/installed
	$(RUN) -m eval.report --out report \
	  --study benchmarks/results/digits_study.json benchmarks/results/ablations.json \
	  --scores benchmarks/results/digits_compare.json benchmarks/results/photographs_compare.json \
	  --throughput benchmarks/results/digits_throughput.json --operators benchmarks/results/operators_cpu.json \
	  benchmarks/results/operators_cpu_intel.json benchmarks/results/operators_cpu_avx2.json benchmarks/results/operators_nvidia_h200.json \
	  benchmarks/results/operators_nvidia_h200_last.json benchmarks/results/operators_nvidia_h200_earlier.json \
	  --ablations benchmarks/results/ablations_speed.json

# One process a core with one thread each: most of a test is Python, and two threads of two processes would wait for each other.
test: $(VENV)/testable
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# Needs torch with CUDA, numpy, pytest, pillow, cmake and nvcc in $(PYTHON)'s environment, nothing else; the same command again resumes.
gpu:
	$(PYTHON) benchmarks/gpu.py

LINT := $(VENV)/linters
$(LINT): $(VENV)/installed
	$(call install,ruff clang-format)
	@touch $@

SOURCES = $(shell git ls-files '*.cpp' '*.cu' '*.h')
lint: $(LINT)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(SOURCES)

format: $(LINT)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(SOURCES)

clean:
	rm -rf $(VENV) build tests/.cache
