# make demo   web → tokenizer → base model → assistant → reasoner → report, on a CPU, in minutes
# make test   everything checked, offline
# Each step is a command you can type yourself. A demo that was interrupted goes on where it was.
SIZE ?= small
SEED ?= 1337
DATA ?= data/demo-$(SIZE)
RUN  ?= runs/demo-$(SIZE)
CHAT ?= $(DATA)/chat
PY   := .venv/bin/python
export GOMP_SPINCOUNT := 20000

ifeq ($(SIZE),tiny)
CRAWL := --max_pages 400
TRAIN := --max_steps 60 --eval_every 30
TALK  := --examples 600 --functions 12
SFT   := --epochs 1
RL    := --max_steps 4 --prompts 4 --group_size 8 --eval_every 2
else
CRAWL := --max_pages 5000
TRAIN := --max_steps 300 --eval_every 50
TALK  := --examples 5000 --functions 48
SFT   := --epochs 1.2
RL    := --max_steps 16 --prompts 16 --group_size 16 --eval_every 8
endif

.PHONY: setup demo test

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
	$(PY) prepare_fineweb.py tokenize --out $(DATA) --tokenizer $(DATA)/tokenizer
	$(PY) train_gpt2.py --model d4 --config n_embd=128 n_head=4 block_size=256 --data $(DATA) \
	    --out $(RUN)-base --total_batch_size 4096 --lr 0.015 --save_every 100 --seed $(SEED) --resume $(TRAIN)
	$(PY) sample.py --model $(RUN)-base --prompt "Return the number of" --num_samples 3 --max_new_tokens 40
	$(PY) sample.py --model $(RUN)-base --prompt "True, False, True, False, True," --temperature 0 --max_new_tokens 8
	$(PY) sample.py --model $(RUN)-base --prompt "Return the" --top 8 --max_new_tokens 2
	$(PY) chat_sft.py make --data $(DATA) --out $(CHAT) --seed $(SEED) $(TALK)
	$(PY) chat_sft.py --model $(RUN)-base --out $(RUN)-sft --data $(CHAT)/identity.jsonl \
	    $(CHAT)/functions.jsonl:2 $(CHAT)/arithmetic.jsonl $(CHAT)/tool.jsonl:0.7 \
	    $(CHAT)/bits.jsonl $(CHAT)/spelling.jsonl --lr 0.005 --save_every 50 --seed $(SEED) --resume $(SFT)
	$(PY) rl_grpo.py --model $(RUN)-sft --out $(RUN)-rl --task $(CHAT)/practice_bits.jsonl \
	    --held_out $(CHAT)/held_out.jsonl --max_new_tokens 64 --save_every 8 --seed $(SEED) --resume $(RL)
	for stage in base sft rl; do $(PY) eval.py --model $(RUN)-$$stage --tasks $(CHAT)/held_out.jsonl || exit 1; done
	$(PY) eval.py report $(RUN)-base $(RUN)-sft $(RUN)-rl --data $(DATA)
	$(PY) eval.py summary $(RUN)-base $(RUN)-sft $(RUN)-rl --data $(DATA)

test: setup
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-extra.txt
	$(PY) -m pytest -q --timeout 120 tests
