# What one does with this tree, in one word each. `make` alone lists the words. It leaves the building to CMakeLists.txt
# and pyproject.toml, and the environment to tools/setup.sh.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)
DEMO_ARGS ?=
BENCH_ARGS ?=
PYTEST_ARGS ?=
XEN_ARGS ?=
VIEW_ARGS ?=
NATIVE := $(wildcard native/*.[ch] native/tests/*.[ch])

.PHONY: help setup demo test test-xen test-view test-view-debug bench deb lint native-test native-test-sanitized fmt clean

help: ## list these words
	@sed -n 's/^\([a-z][a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 32

setup: ## make .venv: system packages (as root on Debian), libraries, both packages
	@$(if $(SETUP_IS_DONE),:,tools/setup.sh)

demo: setup ## show page sharing on this machine (DEMO_ARGS=...)
	@$(BIN)/sharearea demo $(DEMO_ARGS)

# One after the other, pytest last: its closing line is the last one.
test: setup ## all checks and tests: lint, native, native with sanitizers, pytest (PYTEST_ARGS=...)
	@$(MAKE) SETUP_IS_DONE=1 lint
	@$(MAKE) SETUP_IS_DONE=1 native-test
	@$(MAKE) SETUP_IS_DONE=1 native-test-sanitized
	@tools/prometheus.sh
	@tools/node.sh
	@tools/browser.sh >/dev/null
	@tools/test_tools.sh
	@tools/kernel_headers.sh
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

# As root on Debian 12; tests/xen/README.md. Not a part of `test`, but of .ci/run: it boots a machine of its own.
test-xen: setup ## the same on a real Xen, in an emulator (root; XEN_ARGS=...)
	@$(if $(DEB_IS_DONE),:,$(MAKE) SETUP_IS_DONE=1 deb)
	@$(BIN)/python -m tests.xen $(XEN_ARGS)

# Not a part of test-xen: it needs the headers of the guests' kernel as well (docs/view.md).
test-view: setup ## the guest view on a real Xen (root; VIEW_ARGS=...)
	@tools/kernel_headers.sh
	@$(if $(DEB_IS_DONE),:,$(MAKE) SETUP_IS_DONE=1 deb)
	@$(BIN)/python -m tests.xen.view $(VIEW_ARGS)

# Not a part of .ci/run: the first time it builds two kernels (docs/view.md). KASAN makes all of it several times slower.
test-view-debug: export XEN_PATIENCE ?= 6
test-view-debug: setup ## the guest view under kernels that look for faults (root; VIEW_ARGS=...)
	@$(if $(DEB_IS_DONE),:,$(MAKE) SETUP_IS_DONE=1 deb)
	@$(BIN)/python -m tests.xen.view --kernel debug --vcpus 2 --without ratios $(VIEW_ARGS)

bench: setup ## measure (BENCH_ARGS=...)
	@$(BIN)/python -m bench $(BENCH_ARGS)

deb: setup ## Debian packages of both sides, into dist/
	@tools/deb.sh

lint: setup ## ruff, mypy, import-linter, clang-format; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

# The log of a quiet step is shown only if the step fails.
define native_test
	@mkdir -p $(1)
	@$(BIN)/cmake -S . -B $(1) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DSA_BUILD_TESTS=ON $(2) \
	  >$(1)/configure.log || { cat $(1)/configure.log; exit 1; }
	@$(BIN)/cmake --build $(1) --parallel $(JOBS) >$(1)/build.log || { cat $(1)/build.log; exit 1; }
	@$(BIN)/ctest --test-dir $(1) --output-on-failure --no-tests=error
endef

native-test: setup ## the C core's own tests, without Python
	$(call native_test,build/native,)

native-test-sanitized: setup ## the same under AddressSanitizer and UndefinedBehaviorSanitizer
	$(call native_test,build/native-sanitized,-DSA_SANITIZE=ON)

fmt: setup ## format Python and C
	$(BIN)/ruff check --fix-only --select I
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(NATIVE)

clean: ## remove everything that was built or installed
	rm -rf $(VENV) build dist guest-agent/build guest-agent/dist .mypy_cache .pytest_cache .ruff_cache \
	  .import_linter_cache .hypothesis
	find . -name .git -prune -o -name __pycache__ -prune -exec rm -rf {} +
