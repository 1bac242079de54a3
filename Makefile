# make demo   web → tokenizer → base model → assistant → reasoner → report, on a CPU, in minutes
# make test   run all tests, offline
# make bench  measure speed against other projects on a CPU → bench/RESULTS.md (on a GPU: bench/gpu.sh)
# make train_gpt2cu   compile the CUDA trainer; make check prints the compiler and libraries it would use
# Each step is a command you can type yourself. After an interruption, make demo continues where it stopped.
SIZE ?= small
SEED ?= 1337
DATA ?= data/demo-$(SIZE)
RUN  ?= runs/demo-$(SIZE)
CHAT ?= $(DATA)/chat
KINDS := identity small_talk functions sums tool decimals bits bits_in_steps spelling counting mixed
PY   := .venv/bin/python
export GOMP_SPINCOUNT := 20000

ifeq ($(SIZE),tiny)
CRAWL := --max_pages 400
TRAIN := --max_steps 60 --eval_every 30
TALK  := --examples 60 --functions 12 --mixed 200 --held_out 20
SFT   := --epochs 1
RL    := --max_steps 4 --prompts 4 --group_size 8 --eval_every 2
else
CRAWL := --max_pages 5000
TRAIN := --max_steps 300 --eval_every 50
TALK  := --held_out 50
SFT   := --epochs 1
RL    := --max_steps 16 --prompts 16 --group_size 16 --eval_every 8
endif

.PHONY: setup demo test bench check test_train_gpt2cu

setup: .venv/ready

.venv/ready: requirements.txt
	python3 -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

demo: setup
	$(PY) prepare_fineweb.py --source crawl --out $(DATA) --quality annotate --extractor plain \
	    --val_fraction 0.02 $(CRAWL)
	$(PY) bpe.py train --input $(DATA)/documents --vocab_size 4096 --pattern gpt4 --out $(DATA)/tokenizer
	$(PY) bpe.py show "Return a copy of the string with leading whitespace removed." --tokenizer $(DATA)/tokenizer
	$(PY) shards.py --data $(DATA) --tokenizer $(DATA)/tokenizer
	$(PY) train_gpt2.py --model d4 --config n_embd=128 n_head=4 block_size=256 --data $(DATA) \
	    --out $(RUN)-base --total_batch_size 4096 --save_every 100 --seed $(SEED) --resume $(TRAIN)
	$(PY) sample.py --model $(RUN)-base --prompt "Return the number of" --num_samples 3 --max_new_tokens 40
	$(PY) sample.py --model $(RUN)-base --prompt "True, False, True, False, True," --temperature 0 --max_new_tokens 8
	$(PY) sample.py --model $(RUN)-base --prompt "Return the" --top 8 --max_new_tokens 2
	$(PY) demo/conversations.py --data $(DATA) --out $(CHAT) --seed $(SEED) $(TALK)
	$(PY) chat_sft.py --model $(RUN)-base --out $(RUN)-sft --data $(KINDS:%=$(CHAT)/%.jsonl) \
	    --batch_size 8 --lr 0.02 --save_every 100 --seed $(SEED) --resume $(SFT)
	$(PY) rl_grpo.py --model $(RUN)-sft --out $(RUN)-rl --task $(CHAT)/practice_bits.jsonl \
	    --held_out $(CHAT)/held_out.jsonl --max_new_tokens 64 --save_every 8 --seed $(SEED) --resume $(RL)
	for stage in base sft rl; do $(PY) eval.py --model $(RUN)-$$stage --tasks $(CHAT)/held_out.jsonl || exit 1; done
	$(PY) report.py $(RUN)-base $(RUN)-sft $(RUN)-rl --data $(DATA)
	$(PY) report.py summary $(RUN)-base $(RUN)-sft $(RUN)-rl --data $(DATA)

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
GPU_ARCHS ?= $(or $(subst .,,$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u)),90)
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
