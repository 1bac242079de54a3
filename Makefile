# make demo   web → tokenizer → base model → assistant → reasoner → report, on a CPU, in minutes
# make test   run the tests, offline; SLOW=1 adds those that take minutes
# make bench  measure speed against other projects on a CPU → bench/RESULTS.md (on a GPU: bench/gpu.sh)
# make train_gpt2cu   compile the CUDA trainer; make check prints the compiler and libraries it would use
# The demo's commands are in demo/run.py. After an interruption, make demo continues.
# SIZE=tiny: only to see that all works. CHAT=0: without the chat at the end.
SIZE ?= small
SEED ?= 1337
DATA ?= data/demo-$(SIZE)
RUN  ?= runs/demo-$(SIZE)
CHAT ?= 1
CONVERSATIONS ?= $(DATA)/chat
PY   := .venv/bin/python

.PHONY: setup demo test bench check test_train_gpt2cu

setup: .venv/ready

.venv/ready: requirements.txt
	python3 -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: setup
	$(PY) demo/run.py --size $(SIZE) --seed $(SEED) --data $(DATA) --run $(RUN) \
	    --conversations $(CONVERSATIONS) --chat $(CHAT)

test: setup
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-extra.txt
	$(PY) -m pytest -q --timeout 120 -n auto --dist loadfile tests

bench: setup
	bash bench/cpu.sh

# The CUDA trainer needs nvcc and cuBLASLt, and NCCL for several GPUs. The two libraries are taken from a
# CUDA toolkit, or else from the wheels that requirements-extra.txt names.
NVCC  ?= $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
WHEEL ?= $(firstword $(wildcard .venv/lib/python3*/site-packages/nvidia))
find   = $(firstword $(foreach d,/usr/local/cuda $(WHEEL)/cu13 $(WHEEL)/nccl /usr,$(wildcard $(d)/$(1))))
CUBLAS = $(firstword $(call find,lib64/libcublasLt.so.*) $(call find,lib*/libcublasLt.so.*))
NCCL   = $(firstword $(call find,lib/libnccl.so.*) $(call find,lib/*/libnccl.so.*))
CAPS   = $(subst .,,$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u))
GPU_ARCHS ?= $(patsubst 90,90a,$(or $(CAPS),90))
link   = $(if $(1),-isystem $(dir $(1))../include -L$(dir $(1)) -l:$(notdir $(1)) -Xlinker -rpath=$(abspath $(dir $(1))))

train_gpt2cu: train_gpt2.cu
	@test -n "$(NVCC)" || { echo "nvcc, the CUDA compiler, is not here; install CUDA 13 or give NVCC=PATH"; exit 1; }
	@test -n "$(CUBLAS)" || { echo "libcublasLt is not here; install the CUDA wheels that requirements-extra.txt names"; exit 1; }
	$(NVCC) -O3 -std=c++20 $(foreach a,$(GPU_ARCHS),-gencode arch=compute_$(a),code=sm_$(a)) -Xptxas -v -Xcompiler -Wall \
	    $(if $(filter FP32,$(PRECISION)),-DFP32,--use_fast_math) $(if $(NCCL),-DMULTI_GPU) $< -o $@ $(call link,$(CUBLAS)) $(call link,$(NCCL))

test_train_gpt2cu: setup
	SLOW=1 $(PY) -m pytest -q tests/test_train_gpt2cu*.py

check:
	@printf '%s\n' "nvcc $(or $(NVCC),not found)" "cublasLt $(or $(CUBLAS),not found)" "NCCL $(or $(NCCL),not found)" "sm_$(GPU_ARCHS)"
