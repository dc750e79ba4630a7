# Every target makes .venv and the extension itself, so each works on a clean clone:
#   make build     the environment and the extension
#   make demo      generates text with the model in examples/, on two processes
#   make test      build, lint, all tests, and some of them under ASan, UBSan and TSan
#   make lint      ruff, mypy, clang-format
#   make bench     every benchmark
#   make gpu       on a machine with an NVIDIA GPU: builds for it, runs the GPU tests and benchmarks
#   make sanitize  operator and transfer tests under ASan and UBSan, transfer tests under TSan
#   make faults    the fault campaign on every path: KVLINK_FAULTS faults from KVLINK_FAULT_SEED on
#   make fuzz      KVLINK_FUZZ_FRAMES mutated control frames into a live endpoint
#   make stubs     kvlink/_C.pyi from the built extension, after its bindings changed
#   make clean     removes all of this
# Variables: PYTHON (which makes .venv), CXX, MAX_JOBS and those of setup.py (KVLINK_CUDA, ...).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/installed
CXX_SOURCES = $(shell git ls-files --cached --others --exclude-standard 'csrc/*.cpp' 'csrc/*.hpp' \
	'csrc/*.cu' 'csrc/*.cuh' 'csrc/*.inl' 'csrc/*.h')

.PHONY: build demo test lint pytest sanitize sanitize-objects faults fuzz stubs bench gpu clean

build: $(STAMP)
	@$(BIN)/python setup.py -q build_ext --inplace

# The objects that the editable install compiles are those that later builds reuse.
$(STAMP): constraints.txt pyproject.toml
	@echo "making $(VENV) (only the first time, and when the dependencies change)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq --constraint constraints.txt setuptools wheel pybind11 libucx-cu13
	@$(PIP) install -qq --constraint constraints.txt --no-build-isolation \
		--editable '.[serving,test,bench,ucx]'
	@touch $@

demo: build
	@$(BIN)/python examples/demo.py

# What the sanitizers need is compiled with the time that the tests leave idle.
test: build lint
	@$(MAKE) --no-print-directory -j2 pytest sanitize-objects
	@$(MAKE) --no-print-directory sanitize

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES))

pytest: build
	@KVLINK_EMULATION=1 $(BIN)/python setup.py -q build_ext --build-lib build/emulation
	$(BIN)/python -m pytest

# A second build beside the first: nothing that other targets use is touched.
SANITIZED_TESTS ?= $(wildcard $(patsubst %,python_tests/test_%.py,layout pool pool_wrap pages append_kv rope \
	relayout_pages relayout_large convert_rows digest_pages paged_attention paged_attention_bits paged_attention_api \
	paged_attention_features paged_attention_plan merge_states rope_emulated \
	emulation emulation_sm90 cache_ops_emulated attention_emulated attention_sm90_emulated \
	latent_sm90_emulated)) $(wildcard python_tests/operators/test_*.py)

# A quick part of the transfer tests, on every path; SANITIZED_TRANSPORT=* takes all of them.
SANITIZED_TRANSPORT ?= threads moves faults ends sessions deaths lending adopt_group fuzz
SANITIZED_TRANSPORT_TESTS ?= $(filter-out $(patsubst %,%.py,$(addprefix \
	python_tests/transfer/test_transfer_,two_hosts doctor no_ucx ucx_address process)),$(wildcard $(patsubst \
	%,python_tests/transfer/test_transfer_%.py,$(SANITIZED_TRANSPORT))))

SANITIZED := $(BIN)/python python_tests/run_sanitized.py
ADDRESS := address,undefined build/sanitized
THREAD := thread build/sanitized-thread

sanitize: build
	@$(SANITIZED) build $(ADDRESS) $(SANITIZED_TESTS)
	@$(SANITIZED) build $(THREAD)
	@$(SANITIZED) test $(ADDRESS) $(SANITIZED_TESTS) $(SANITIZED_TRANSPORT_TESTS)
	@$(SANITIZED) test $(THREAD) $(SANITIZED_TRANSPORT_TESTS)

# One compiler, with time that nobody else wants.
sanitize-objects: build
	@$(SANITIZED) objects $(ADDRESS) $(SANITIZED_TESTS)
	@$(SANITIZED) objects $(THREAD)

KVLINK_FAULTS ?= 1000
KVLINK_FAULT_SEED ?= 0
FAULT_PATHS ?= host_shm ucx

faults: build
	@status=0; for path in $(FAULT_PATHS); do \
		$(BIN)/python -m kvlink.testing.faults --path $$path --faults $(KVLINK_FAULTS) \
			--seed $(KVLINK_FAULT_SEED) || status=1; \
	done; exit $$status

KVLINK_FUZZ_FRAMES ?= 1000000

fuzz: build
	@$(BIN)/python -m kvlink.testing.fuzz --frames $(KVLINK_FUZZ_FRAMES) --seed $(KVLINK_FAULT_SEED)

stubs: build
	@$(BIN)/python tools/make_stubs.py

bench: build
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

# No .venv: the machine's own torch knows its CUDA. Needs no network. FLASHINFER: wheels of it and of
# what it needs and the machine lacks; OUTPUT: the report's folder; GPU_FLAGS: --quick takes two
# minutes instead of nine.
GPU_FLAGS ?=
FLASHINFER ?=
OUTPUT ?= benchmarks/results
gpu:
	$(PYTHON) tools/run_gpu.py --output $(OUTPUT) $(GPU_FLAGS) \
		$(if $(FLASHINFER),--flashinfer $(FLASHINFER))

clean:
	rm -rf $(VENV) build dist kvlink.egg-info kvlink/*.so .pytest_cache .mypy_cache .ruff_cache \
		.hypothesis
