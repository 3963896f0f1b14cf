# A thin front to CMake: `make demo`, `make test`, `make bench` install what is missing, build the preset `release`, and run.
# `make lint` runs clang-tidy.  There is no build rule here; see CMakePresets.json.
BUILD := build/release
WERROR := $(if $(filter true 1,$(CI)),ON,OFF)
JOBS ?= $(shell nproc)

.PHONY: demo test bench lint packages build
.NOTPARALLEL:

demo: build
	$(BUILD)/espalier-grpo --model examples/models/mix-moe --train examples/tasks/mix-prompts.jsonl \
	    --eval examples/tasks/mix-eval.jsonl --steps 60 --seed 0 --out out/demo

test: build
	ctest --preset release --parallel 2

bench: build
	BUILD=$(BUILD) tests/bench/run.sh

lint: build
	clang-tidy -p $(BUILD) --quiet --warnings-as-errors='*' $$(git ls-files 'src/*.c' 'kernels/*.c' 'examples/*.c')

build: packages
	generator=$$(test -f $(BUILD)/CMakeCache.txt || ! command -v ninja >/dev/null || echo "-G Ninja"); \
	    cmake --preset release $$generator -DESPALIER_BUILD_TESTS=ON -DESPALIER_WERROR=$(WERROR)
	cmake --build --preset release --parallel $(JOBS)

packages:
	cmake/packages.sh
