# Fine-tune openPangu-Embedded: `make` lists the targets.
MAKEFLAGS += --no-builtin-rules --no-print-directory
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL: # stages depend on each other, and each uses the whole machine
.SUFFIXES:

# Unknown targets and variables are refused before anything runs. scripts/targets.awk reads from this file which exist:
# a line with ## is a target, one with ##= a variable; “for a, b:” limits it to these targets. “##@+” is in help-all only.
typed := $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v))
quote = '$(subst ','\'',$1)'
ifeq ($(MAKELEVEL),0) # a make within make passes on variables that the user did not type here
ifneq ($(MAKECMDGOALS)$(typed),)
words := $(foreach g,$(MAKECMDGOALS),$(call quote,$g)) $(foreach v,$(typed),$(call quote,$v=$(firstword $(value $v))))
ifneq ($(shell awk -v mode=check -f scripts/targets.awk Makefile $(words) || echo wrong),)
$(error nothing was done)
endif
endif
endif

##@+ Variables of all targets
##= RECIPE  recipe file (recipes/openpangu-1b.yaml; for demo: recipes/demo.yaml)
##= SET  override the recipe: SET="train.lr=1e-5 train.iterations=9"
##= YES  0|1: 1 runs the Python files of the checkpoint's tokenizer unasked: docs/checkpoints.md
##= RUNTIME  docker|host: run in the image or in VENV (docker, if an engine answers and has this version's image)
##= TARGET  npu|cpu: which image (for stages: npu on a host with NPUs; for the image's targets: npu)
##= NPUS  NPUs visible in the container: 0,1,2,3 (all)
##= CACHE  directory mounted at /cache in the container (/cache)
##= DOCKER_FLAGS  more options for docker run: DOCKER_FLAGS="-v /models:/models:ro"
##= DOCKER  client of the Docker engine (docker)
##= VENV  Python environment (.venv)
VENV ?= .venv
##= PYTHON  CPython 3.9, 3.10 or 3.11 to create it with (the first one found)
##= PYPI_INDEX  package index or a mirror of it (https://pypi.org/simple)
PYPI_INDEX ?= https://pypi.org/simple
##= HTTPS_PROXY, HTTP_PROXY, NO_PROXY, SSL_CERT_FILE
##=   proxies, and a file of trusted certificates; best set in the environment

##@+ Variables of some targets
##= SHARD  for preprocess: 3/16 processes the third of sixteen parts only, to spread them over machines
##= SAMPLE  for preview: number of one sample, from 1 (the first three)
##= HTML  for preview, report: output page (preview.html in paths.cache; report.html in the run)
##= RUN  for report: directory of a run (paths.run)
##= WITH  for report: directory of a second run to compare with
##= DATASET  for inspect: a directory or a path prefix (the recipe's dataset)
##= PROMPT  for chat: one question to answer
##= SYSTEM  for chat: system prompt
##= TOOLS  for chat: a JSON file of tool definitions
##= LISTEN  for serve: ADDRESS:PORT (127.0.0.1:8000); other addresses need OPENPANGU_API_KEY in the environment
##= MODEL  for chat, serve: another checkpoint or LoRA adapter (paths.export, else paths.run, else paths.hf)
##= FROM  for convert, export: another checkpoint, a run, or a LoRA adapter (paths.hf; paths.run)
##= FROM  for load: an archive of make save (this folder)
##= ITERATION  for convert, export, verify, evaluate, chat, serve: iteration of a run, or best; for evaluate also: all (newest)
##= DTYPE  for convert, export: fp32|bf16|fp16: type of the weights (unchanged)
##= FORM  for export: llama|openpangu|peft: llama loads without remote code, peft is LoRA adapters alone (llama)
##= PROMPTS  for evaluate: questions, a .txt file with one per line, or conversations (some of the validation set)
##= BENCH  for evaluate: tasks of lm-evaluation-harness, or YAML files of tasks, with commas
##= HF  for verify: Hugging Face checkpoint (paths.hf)
##= MCORE  for verify: Megatron-core checkpoint or run (paths.mcore)
##= ONLY  for verify: tensors|manifest: no logits; or only the files of MCORE against their checksums (everything)
##= MEMORY  for plan: GiB per device (32 and 64)
##= TOKENS_PER_SECOND  for plan: of the whole run (measured so far)
##= RESUME  for sft: changed: go on with another learning rate or schedule
##= DRY_RUN  for sft: 0|1: 1 only prints the environment and the command of the mindspeed engine
##= JSON  for doctor, plan: 0|1: 1 prints the result as JSON
##= CLAIM  for kubernetes: PersistentVolumeClaim mounted at /cache
##= REGISTRY  for push: registry.example.org/team
##= DIST, LEVEL  for save: directory of the archive (dist); gzip level, 1 to 9 (6)
##= BASE, BUILD_BASE  for image, image-diff, lock-base: other base images: docs/image.md
##= ARCH  for image, image-diff, save, push, test-image: amd64|arm64: another architecture, emulated by qemu (this one's)
##= COSIGN_KEY, COSIGN_FLAGS  for push: sign the image, its SBOM and provenance with this key: docs/image.md
##= CPU_BASE  for lock-base: another base of the cpu image
##= TORCH, TORCH_INDEX, PYTHON_URL, PYTHON_SHA256, CA, IMAGE_FLAGS, TAG
##=   for image, image-diff: mirrors, certificates and more options for docker build: docs/image.md
##= MEGATRON_LM_URL, MINDSPEED_URL, MINDSPEED_LLM_URL
##=   for sources, image, image-diff, test-upstream, bench-step: other repositories or folders to fetch from (patches/upstream.toml)
##= PANGU_URL  for test-upstream: another copy of openPangu's repository
##= SIZE  for bench-data: MB of samples to preprocess (200)
SIZE ?= 200
##= DATA_DIR  for bench-data: directory of the real conversations to sample from: docs/benchmarks.md
DATA_DIR ?=
##= TRL  for bench-train: directory into which pip has installed TRL: docs/benchmarks.md
TRL ?=
##= PYTEST_ADDOPTS  for test, test-random, test-image, test-upstream: options of pytest (-x)
##= LOCKFLAGS  for lock: --upgrade takes the newest version of everything

##@+ Trackers
##= SWANLAB_*, WANDB_*  passed on to training: keys, modes, projects: docs/sft.md

##@+ Several machines
##= NNODES  number of machines that train together (parallel.nodes)
##= MASTER_ADDR, MASTER_PORT, NODE_RANK
##=   address and port of the first machine (port 6000), and number of this one, from 0: docs/operations.md
##= HCCL_*, GLOO_SOCKET_IFNAME, TP_SOCKET_IFNAME, OMP_NUM_THREADS  passed on to training

# Values are text and not Make: a $ in a prompt stays a $.
options := RECIPE SET SHARD SAMPLE HTML RUN WITH DATASET PROMPT SYSTEM TOOLS MODEL FROM ITERATION DTYPE FORM PROMPTS
options += YES HF MCORE ONLY MEMORY TOKENS_PER_SECOND DRY_RUN RESUME JSON CLAIM LISTEN BENCH
$(foreach v,$(options) $(typed) VENV PYPI_INDEX SIZE DATA_DIR NNODES TARGET ARCH,$(eval override $v := $$(value $v)))
ifneq ($(NNODES),)
override SET += parallel.nodes=$(NNODES)
endif
export VENV PYPI_INDEX $(typed)

bin = $(call quote,$(VENV)/bin/)

##@ Start here
demo: ## every stage with a small model, on any machine, in minutes
doctor: ## check this machine against the recipe
plan: ## estimate memory, disk and time before a run
setup: env ## create or update the Python environment (others do so themselves)
	@echo 'Ready:' $(call quote,$(VENV))
help: ## this list
help-all: ## all targets and variables
help help-all:
	@awk -v mode=$@ -v width="$${COLUMNS:-$$(tput cols 2>/dev/null)}" -f scripts/targets.awk Makefile

##@ Stages, in this order
format: ## convert raw conversations to samples
preprocess: ## tokenize and pack samples into shards
merge: ## join all shards into the dataset for training
convert: ## convert a checkpoint to Megatron-core
sft: ## fine-tune; rerun to resume
export: ## convert a checkpoint of the run to Hugging Face
chat: ## talk to the trained model
serve: ## answer OpenAI clients with it

##@ Inspect
preview: ## show what training will see, token by token
inspect: ## check a packed dataset, also MindSpeed-LLM's
verify: ## check that two checkpoints are the same model
evaluate: ## validation loss and answers, before and after training
report: ## HTML report of a run, or of two side by side

##@+ For NPUs
smoke: ## compare MindSpeed-LLM's own commands with ours on a CPU, in minutes
slurm: ## print a Slurm script for several machines
kubernetes: ## print a Kubernetes (Volcano) job

commands := demo doctor plan format preprocess merge convert sft export chat serve
commands += preview inspect verify evaluate report smoke slurm kubernetes
# What a command takes of the options, by the ##= lines, reaches it as OPENPANGU_RECIPE and so on.
taken = $(filter RECIPE SET YES $(shell awk -v mode=taken -v target=$1 -f scripts/targets.awk Makefile),$(options))
given = $(foreach v,$(call taken,$1),$(if $(value $v),$v))
$(foreach t,$(filter $(commands),$(MAKECMDGOALS)),$(foreach v,$(call given,$t),$(eval $t: export OPENPANGU_$v := $$($v))))
$(commands):
	@MAKE_OPTIONS='$(call given,$@)' scripts/run.sh openpangu-sft $@

sources: env ## fetch MindSpeed-LLM and its dependencies, pinned and patched
	@$(bin)openpangu-sft sources

test-upstream: export PANGU_URL ?= https://github.com/wujing215/OpenPangu7B-on-NVIDIA
test-upstream: sources ## tests that run the real MindSpeed-LLM, and openPangu's own parsers
	@OMP_NUM_THREADS=1 $(bin)pytest --stamp test-upstream $(wildcard tests/*/test_upstream.py) \
	    tests/training/mindspeed tests/demo/test_smoke.py tests/plan/test_mindspeed_memory.py

##@+ Image
shell: ## a shell where the stages run
	@scripts/run.sh bash

# Mirrors, certificates and other replacements: scripts/image/build.sh, docs/image.md
image: $(if $(filter npu,$(or $(TARGET),npu)),sources) ## build the container image of TARGET
	@scripts/image/build.sh

image-diff: $(if $(filter npu,$(or $(TARGET),npu)),sources) ## build it twice from scratch and compare all files
	@scripts/image/diff.sh

save: ## pack the image into an offline bundle (air-gapped)
	@scripts/image/save.sh

load: ## check an offline bundle and load its image
	@scripts/image/load.sh

push: ## push the image to a registry
	@scripts/image/push.sh

lock-base: ## pin the base images by digest in locks/bases.txt
	@scripts/image/lock_bases.sh

##@+ Benchmarks
# Measurements and further options: docs/benchmarks.md
bench-data: env ## preprocessing against its limit and the published recipe
	@$(bin)python -m benchmarks.data --size $(call quote,$(SIZE)) --data-dir $(call quote,$(DATA_DIR))

bench-convert: env ## conversions of a full-size checkpoint against copying it
	@$(bin)python -m benchmarks.convert

bench-step: sources ## the patched training step against the published one, on the stand-in
	@$(bin)python -m benchmarks.step

bench-train: env ## the transformers engine against TRL and the Hugging Face Trainer
	@$(bin)python -m benchmarks.train $(if $(TRL),--trl $(call quote,$(TRL)))

##@+ Development
test: lint ## lint, then all tests
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(bin)pytest --numprocesses auto --maxprocesses 4 --dist loadfile \
	    --ignore tests/image tests
	@$(bin)python tests/stamp.py

test-random: env ## property tests with new random inputs
	@OMP_NUM_THREADS=1 $(bin)pytest --numprocesses auto --maxprocesses 4 --ignore tests/image \
	    -m hypothesis --hypothesis-profile random tests

test-image: env ## tests of the image: needs Docker, half an hour, 40 GB
	@$(bin)pytest $(if $(ARCH),--timeout 7200 \
	    --stamp $(call quote,test-image-$(ARCH)) tests/image/test_emulated.py,--timeout 1800 --stamp test-image tests/image)

lint: env ## check formatting, style, types, shell scripts
	@$(bin)ruff format --check --output-format concise .
	@$(bin)ruff check .
	@$(bin)mypy
	@PATH=$(bin):"$$PATH"; check() { \
	    if command -v "$$1" >/dev/null || [ "$$(uname -m)" = x86_64 ]; then "$$@"; \
	    else echo "$$1 is not installed (it has no wheel for this machine): not run"; fi; }; \
	    check shellcheck -x $(wildcard .ci/run *.sh */*.sh */*/*.sh) && check hadolint Dockerfile

audit: env ## look up known vulnerabilities of the packages in locks/: SECURITY.md
	@$(bin)python scripts/audit.py

fmt: env ## apply formatting and style fixes
	@$(bin)ruff format .
	@$(bin)ruff check --fix-only .

# Requirements with hashes instead of uv.lock, which contains the index's URLs and so excludes mirrors. Keeps versions if
# possible; LOCKFLAGS=--upgrade takes the newest. At the end checks that every supported platform has all wheels.
compile = $(bin)uv --no-config --no-python-downloads pip compile --quiet --default-index $(call quote,$(PYPI_INDEX)) \
    --python-version 3.9 --universal --fork-strategy fewest --only-binary :all: --generate-hashes --no-annotate \
    --no-emit-index-url --custom-compile-command 'make lock' $(LOCKFLAGS)
# The image installs torch separately: PyTorch's CPU build (locks/torch-cpu.txt, by hand) or PyPI's with CUDA libraries.
cuda = $(shell sed -n 's/^\(nvidia-[a-z0-9-]*-cu12\|triton\)==.*/\1/p' locks/portable.txt)
# lm-eval requires these for some tasks, and imports them only there; they have no wheels.
sources := rouge-score sqlitedict word2number
never = $(foreach name,$1,"\n$(name) ; python_version < '3'")
beside_torch := filelock fsspec jinja2 markupsafe mpmath networkx sympy typing-extensions
left_out = $(foreach name,$1,--no-emit-package $(name))
lock: env ## update locks/ from pyproject.toml
	@printf '%b' $(call never,$(sources)) | $(compile) --overrides /dev/stdin --group dev --group upstream pyproject.toml \
	    --output-file locks/portable.txt
	@echo uv | $(compile) - --output-file locks/uv.txt
	@$(compile) $(call left_out,$(cuda) torch) --constraint locks/portable.txt pyproject.toml --output-file locks/image-cpu.txt
	@printf '%b' torch==2.1.0 $(call never,$(sources)) | $(compile) $(call left_out,$(cuda) torch) --overrides /dev/stdin \
	    --constraint locks/portable.txt --group npu pyproject.toml --output-file locks/image-npu.txt
	@$(compile) --group pyproject.toml:sbom --output-file locks/sbom.txt
	@echo torch==2.1.0 | $(compile) $(call left_out,$(beside_torch)) --constraint locks/portable.txt - \
	    --output-file locks/torch-pypi.txt
	@for machine in x86_64 aarch64; do for python in 3.9 3.10 3.11; do \
	    $(bin)uv --no-config --no-python-downloads pip compile --quiet --default-index $(call quote,$(PYPI_INDEX)) \
	        --no-deps --only-binary :all: --python-version $$python --python-platform $$machine-manylinux_2_36 \
	        locks/portable.txt >/dev/null || exit 1; done; done

clean: ## remove files of demo, tests and tools (not the environment)
	@rm -rf .cache/demo .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist src/*.egg-info
	@find src tests scripts benchmarks -name __pycache__ -prune -exec rm -rf {} +

env:
	@test -f scripts/setup.sh || { echo 'openpangu-sft: an offline bundle has no code for this target -> use a clone of the repository' >&2; exit 1; }
	@scripts/setup.sh

.PHONY: $(commands) help help-all setup sources test-upstream shell image image-diff save load push lock-base \
    bench-data bench-convert bench-step bench-train test test-random test-image lint audit fmt lock clean env
