# Fine-tune openPangu-Embedded: `make` lists what there is.
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # stages follow one another, and each uses the whole machine
.SUFFIXES:

# A mistyped target, variable or value ends make before anything has begun. scripts/targets.awk reads in this file what there
# is: a line with ## is a target, one with ##= a variable; “for a, b:” keeps it to these targets, “x|y:” are its choices.
typed := $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v))
ifeq ($(MAKELEVEL),0) # make within make hands on variables that nobody has typed
ifneq ($(MAKECMDGOALS)$(typed),)
quoted = '$(subst ','\'',$1)'
# of a value, the first word: choices have no more
words := $(foreach g,$(MAKECMDGOALS),$(call quoted,$g)) $(foreach v,$(typed),$(call quoted,$v=$(firstword $(value $v))))
ifneq ($(shell awk -v mode=check -f scripts/targets.awk Makefile $(words) || echo wrong),)
$(error nothing was done)
endif
endif
endif

# Read before RECIPE has its default: the demo has a recipe of its own.
demo_recipe := $(or $(value RECIPE),recipes/demo.yaml)

##@ Variables of all targets
##= RECIPE  the recipe file (recipes/openpangu-1b.yaml; for demo: recipes/demo.yaml)
RECIPE ?= recipes/openpangu-1b.yaml
##= SET  override the recipe: SET="train.lr=1e-5 train.iterations=9"
SET ?=
##= RUNTIME  docker|host: in the image or in VENV (docker, where an engine answers and has this version's image)
RUNTIME ?=
##= TARGET  npu|cpu: which image (for stages: npu on a host that has NPUs; for the image's targets: npu)
TARGET ?=
##= NPUS  which NPUs a container sees: 0,1,2,3 (all)
NPUS ?=
##= CACHE  the directory that is /cache in a container (/cache)
CACHE ?=
##= DOCKER_FLAGS  more for docker run: DOCKER_FLAGS="-v /models:/models:ro"
DOCKER_FLAGS ?=
##= DOCKER  the client of the Docker engine (docker)
##= VENV  the Python environment (.venv)
VENV ?= .venv
##= PYTHON  CPython 3.9, 3.10 or 3.11 to make it with (the first one found)
PYTHON ?=
##= PYPI_INDEX  the package index or a mirror of it (https://pypi.org/simple)
PYPI_INDEX ?= https://pypi.org/simple
##= HTTPS_PROXY, HTTP_PROXY, NO_PROXY, SSL_CERT_FILE
##=   proxies, and a file of certificates to trust; best in the environment

##@ Variables of some targets
##= SHARD  for preprocess: 3/16 makes the third of sixteen parts only, for as many machines
SHARD ?=
##= SAMPLE  for preview: the number of one sample, from 1 (the first three)
SAMPLE ?=
##= HTML  for preview, report: where the page goes (preview.html in paths.cache; report.html in the run)
HTML ?=
##= RUN  for report: the directory of a run (paths.run)
RUN ?=
##= WITH  for report: that of a second run, to show beside it
WITH ?=
##= DATASET  for inspect: a directory or a path prefix (the recipe's dataset)
DATASET ?=
##= PROMPT  for chat: the one question to answer
PROMPT ?=
##= MODEL  for chat: another checkpoint (paths.export; without one paths.run, then paths.hf)
MODEL ?=
##= FROM  for convert, export: another checkpoint of any layout, or a run (paths.hf; paths.run)
##= FROM  for load: an archive of make save (this folder)
FROM ?=
##= ITERATION  for convert, export, verify, evaluate: of a run (the newest); for evaluate also: all
ITERATION ?=
##= DTYPE  for convert, export: fp32|bf16|fp16: type of the weights (as it is)
DTYPE ?=
##= FORM  for export: llama|openpangu: llama loads without remote code (llama)
FORM ?=
##= PROMPTS  for evaluate: questions, a .txt file with one on each line, or conversations (some held-out ones)
PROMPTS ?=
##= HF  for verify: the Hugging Face checkpoint (paths.hf)
HF ?=
##= MCORE  for verify: the Megatron-core checkpoint or run (paths.mcore)
MCORE ?=
##= ONLY  for verify: tensors|manifest: no logits; or only the files of MCORE against its sums (all is compared)
ONLY ?=
##= MEMORY  for plan: GB of a device (32 and 64)
MEMORY ?=
##= TOKENS_PER_SECOND  for plan: of the whole run (what the run has measured so far)
TOKENS_PER_SECOND ?=
##= DRY_RUN  for sft: 0|1: 1 only prints the environment and the command of the mindspeed engine
DRY_RUN ?=
##= JSON  for doctor, plan: 0|1: 1 prints what it found as JSON
JSON ?=
##= PEERS  for doctor: other machines to reach: PEERS="node2 node3:22"
PEERS ?=
##= CLAIM  for kubernetes: the PersistentVolumeClaim that becomes /cache
CLAIM ?=
##= REGISTRY  for push: registry.example.org/team
REGISTRY ?=
##= DIST, LEVEL  for save: where the archive goes (dist); how much gzip compresses, 1 to 9 (6)
##= BASE, BUILD_BASE  for image, image-diff, lock-base: other base images: docs/image.md
##= ARCH  for image, image-diff, save, push, test-image: amd64|arm64: another machine's, which qemu emulates (this one's)
ARCH ?=
##= COSIGN_KEY, COSIGN_FLAGS  for push: sign the image, its SBOM and provenance with this key: docs/image.md
##= CPU_BASE  for lock-base: another base of the cpu image
##= TORCH, TORCH_INDEX, PYTHON_URL, PYTHON_SHA256, CA, IMAGE_FLAGS, TAG
##=   for image, image-diff: mirrors, certificates and more options for docker build: docs/image.md
##= MEGATRON_LM_URL, MINDSPEED_URL, MINDSPEED_LLM_URL
##=   for sources, image, image-diff, test-upstream: other repositories or folders to fetch from (patches/upstream.toml)
MEGATRON_LM_URL ?=
MINDSPEED_URL ?=
MINDSPEED_LLM_URL ?=
##= SIZE  for bench-data: MB of samples to preprocess (200)
SIZE ?= 200
##= DATA_DIR  for bench-data: the real conversations that it draws from (../shared/data)
DATA_DIR ?= ../shared/data
##= PYTEST_ADDOPTS  for test, test-random, test-image, test-upstream: options of pytest (-x)
##= LOCKFLAGS  for lock: --upgrade takes the newest version of everything

##@ Several machines
##= NNODES  how many machines train together (parallel.nodes)
NNODES ?=
##= MASTER_ADDR, MASTER_PORT, NODE_RANK
##=   address and port of the first machine (port 6000), and which one this is, from 0: docs/operations.md
##= HCCL_*, GLOO_SOCKET_IFNAME, TP_SOCKET_IFNAME, OMP_NUM_THREADS  handed on to training as they are

# What the user gives is text and not Make: a $ in a prompt stays a $. These the Makefile itself uses, so in the environment too;
# others, like proxies, it only hands on.
urls := MEGATRON_LM_URL MINDSPEED_URL MINDSPEED_LLM_URL
variables := RECIPE SET SHARD SAMPLE HTML DATASET PROMPT MODEL FROM ITERATION DTYPE FORM PROMPTS RUN WITH HF MCORE ONLY SIZE DATA_DIR VENV PYTHON PYPI_INDEX $(urls)
variables += MEMORY TOKENS_PER_SECOND NNODES JSON PEERS CLAIM DRY_RUN RUNTIME TARGET ARCH NPUS CACHE DOCKER_FLAGS REGISTRY
others := $(filter-out $(variables),$(typed))
$(foreach v,$(variables) $(others),$(eval override $v := $$(value $v)))
export PROMPT VENV PYTHON PYPI_INDEX $(urls) RUNTIME TARGET ARCH NPUS CACHE DOCKER_FLAGS REGISTRY $(others)

quote = '$(subst ','\'',$1)'
bin = $(call quote,$(VENV)/bin/)
sets = $(foreach s,$(SET),--set $(call quote,$s)) $(if $(NNODES),--set $(call quote,parallel.nodes=$(NNODES)))
given = $(if $($1),--$2=$(call quote,$($1)))
options = --recipe $(call quote,$(RECIPE)) $(sets)
run = scripts/run.sh openpangu-sft

##@ Start here
.PHONY: help setup demo doctor
help: ## this list
	@awk -v mode=help -v width="$${COLUMNS:-$$(tput cols 2>/dev/null)}" -f scripts/targets.awk Makefile

setup: env ## make or update the Python environment (others do so themselves)
	@echo 'Ready:' $(call quote,$(VENV))

demo: ## every stage with a small model, on any machine, in minutes
	@$(run) demo --recipe $(call quote,$(demo_recipe)) $(sets)

doctor: ## what this machine has and lacks for the recipe
	@$(run) doctor $(options) $(if $(filter-out 0,$(JSON)),--json) $(foreach p,$(PEERS),--peer=$(call quote,$p))

##@ Stages, in this order
stages := format preprocess merge convert sft export
.PHONY: $(stages) preview chat
format: ## raw conversations to samples
preprocess: ## samples to packed shards of token ids
merge: ## all shards to the one dataset that training reads
convert: ## a checkpoint to Megatron-core's form
sft: ## fine-tune
export: ## a checkpoint of the run to Hugging Face's
$(stages):
	@$(run) $@ $(options) $(more)
preprocess: more = $(call given,SHARD,shard)
moved = $(call given,FROM,from) $(call given,ITERATION,iteration) $(call given,DTYPE,dtype)
convert: more = $(moved)
sft: more = $(if $(filter-out 0,$(DRY_RUN)),--dry-run)
export: more = $(moved) $(call given,FORM,form)

chat: ## talk to the trained model
	@$(run) chat $(options) $(call given,MODEL,model) $${PROMPT:+"--prompt=$$PROMPT"}

##@ Beside the stages
.PHONY: preview inspect verify plan curve evaluate report
preview: ## what training will see, token by token
	@$(run) preview $(options) $(call given,SAMPLE,sample) $(call given,HTML,html)

inspect: ## check a packed dataset, also MindSpeed-LLM's
	@$(run) inspect $(options) $(if $(DATASET),-- $(call quote,$(DATASET)))

verify: ## whether two checkpoints are the same model
	@$(run) verify $(options) $(call given,HF,hf) $(call given,MCORE,mcore) $(call given,ITERATION,iteration) \
	    $(if $(ONLY),--$(call quote,$(ONLY)))

plan: ## before a run: memory, disk, time
	@$(run) plan $(options) $(call given,MEMORY,memory) $(call given,TOKENS_PER_SECOND,tokens-per-second) \
	    $(if $(filter-out 0,$(JSON)),--json)

evaluate: ## loss on held-out conversations, and answers
	@$(run) evaluate $(options) $(call given,PROMPTS,prompts) $(call given,ITERATION,iteration)

report: ## one page about a run, or about two side by side
	@$(run) report $(options) $(call given,RUN,run) $(call given,WITH,with) $(call given,HTML,html)

curve: ## draw the run's loss.png as it is now, also while it trains
	@$(run) curve $(options)

##@ For the NPUs
.PHONY: sources smoke test-upstream slurm kubernetes
sources: env ## fetch MindSpeed-LLM and what it needs, pinned and patched
	@$(bin)openpangu-sft sources

smoke: ## MindSpeed-LLM on a CPU compared with ours, in minutes
	@$(run) smoke

slurm: ## a Slurm script for several machines, on stdout
	@$(run) slurm $(options)

kubernetes: ## a Kubernetes (Volcano) job, on stdout
	@$(run) kubernetes $(options) $(call given,CLAIM,claim)

test-upstream: sources ## the tests that run the real MindSpeed-LLM
	@OMP_NUM_THREADS=1 $(bin)pytest --stamp test-upstream $(wildcard tests/*/test_upstream.py) \
	    tests/training/mindspeed tests/demo/test_smoke.py tests/plan/test_mindspeed_memory.py

##@ Image
.PHONY: shell image image-diff save load push lock-base
shell: ## a shell where the stages run
	@scripts/run.sh bash

# what may be replaced, mirrors and certificates among it: scripts/image/build.sh, docs/image.md
image: $(if $(filter cpu,$(TARGET)),,sources) ## build the container image of TARGET
	@scripts/image/build.sh

image-diff: $(if $(filter cpu,$(TARGET)),,sources) ## build it twice, from nothing, and compare all files
	@scripts/image/diff.sh

save: ## the image in one archive, for a team without a network
	@scripts/image/save.sh

load: ## check such an archive and load its image
	@FROM=$(call quote,$(FROM)) scripts/image/load.sh

push: ## the image to a registry
	@scripts/image/push.sh

lock-base: ## pin the base images by digest, in locks/bases.txt
	@scripts/image/lock_bases.sh

##@ Benchmarks
.PHONY: bench-data bench-convert
# what is measured, and more options: docs/benchmarks.md
bench-data: env ## preprocessing against its limit and the published way
	@$(bin)python -m benchmarks.data --size $(call quote,$(SIZE)) --data-dir $(call quote,$(DATA_DIR))

bench-convert: env ## conversions of a full-size checkpoint against copying it
	@$(bin)python -m benchmarks.convert

##@ Development
.PHONY: test test-random test-image lint fmt lock clean
test: lint ## lint, then all tests
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(bin)pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
	    --ignore tests/image tests
	@$(bin)python tests/stamp.py

test-random: env ## the property tests, with other input each time
	@OMP_NUM_THREADS=1 $(bin)pytest --numprocesses auto --maxprocesses 4 --ignore tests/image \
	    -m hypothesis --hypothesis-profile random tests

test-image: env ## the image's tests: Docker, half an hour, 40 GB
	@$(if $(ARCH),ARCH=$(call quote,$(ARCH)) )$(bin)pytest $(if $(ARCH),--timeout 7200 \
	    --stamp $(call quote,test-image-$(ARCH)) tests/image/test_emulated.py,--timeout 1800 --stamp test-image tests/image)

lint: env ## formatting, style, types, shell scripts
	@$(bin)ruff format --check --output-format concise .
	@$(bin)ruff check .
	@$(bin)mypy
	@PATH=$(bin):"$$PATH"; check() { \
	    if command -v "$$1" >/dev/null || [ "$$(uname -m)" = x86_64 ]; then "$$@"; \
	    else echo "$$1 is not installed (it has no wheel for this machine): not run"; fi; }; \
	    check shellcheck -x $(wildcard .ci/run *.sh */*.sh */*/*.sh) && check hadolint Dockerfile

fmt: env ## apply the formatting that lint wants
	@$(bin)ruff format .
	@$(bin)ruff check --fix-only .

# Requirements with hashes and not uv.lock: that one holds the index's file addresses, so no mirror could be used.
# Keeps the versions it can; LOCKFLAGS=--upgrade takes the newest of all. Then every supported machine must have
# a wheel of everything, as nothing is built.
compile = $(bin)uv --no-config --no-python-downloads pip compile --quiet --default-index $(call quote,$(PYPI_INDEX)) \
    --python-version 3.9 --universal --fork-strategy fewest --only-binary :all: --generate-hashes --no-annotate \
    --no-emit-index-url --custom-compile-command 'make lock' $(LOCKFLAGS)
# The image takes torch by itself: PyTorch's CPU build (locks/torch-cpu.txt, by hand) or PyPI's with CUDA's libraries.
cuda = $(shell sed -n 's/^\(nvidia-[a-z0-9-]*\|triton\)==.*/\1/p' locks/portable.txt)
beside_torch := filelock fsspec jinja2 markupsafe mpmath networkx sympy typing-extensions
left_out = $(foreach name,$1,--no-emit-package $(name))
lock: env ## re-make locks/ from pyproject.toml
	@$(compile) --group dev --group upstream pyproject.toml --output-file locks/portable.txt
	@echo uv | $(compile) - --output-file locks/uv.txt
	@$(compile) $(call left_out,$(cuda) torch) --constraint locks/portable.txt pyproject.toml --output-file locks/image-cpu.txt
	@echo torch==2.1.0 | $(compile) $(call left_out,$(cuda) torch) --constraint locks/portable.txt --overrides /dev/stdin \
	    --group npu pyproject.toml --output-file locks/image-npu.txt
	@$(compile) --group pyproject.toml:sbom --output-file locks/sbom.txt
	@echo torch==2.1.0 | $(compile) $(call left_out,$(beside_torch)) --constraint locks/portable.txt - \
	    --output-file locks/torch-pypi.txt
	@for machine in x86_64 aarch64; do for python in 3.9 3.10 3.11; do \
	    $(bin)uv --no-config --no-python-downloads pip compile --quiet --default-index $(call quote,$(PYPI_INDEX)) \
	        --no-deps --only-binary :all: --python-version $$python --python-platform $$machine-manylinux_2_36 \
	        locks/portable.txt >/dev/null || exit 1; done; done

clean: ## remove what demo, tests and tools wrote (not the environment)
	@rm -rf .cache/demo .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist src/*.egg-info
	@find src tests scripts benchmarks -name __pycache__ -prune -exec rm -rf {} +

.PHONY: env
env:
	@test -f scripts/setup.sh || { echo 'openpangu-sft: a hand-over has no code for this target -> take a clone' >&2; exit 1; }
	@scripts/setup.sh
