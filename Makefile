# The project's commands. Each installs what it needs (scripts/setup.sh) and works from a fresh clone.
.DEFAULT_GOAL := help
.PHONY: help demo test test-torch test-torch-core test-jax build wheel lint fuzz bench gpu-bundle setup docs clean

SECONDS_PER_TARGET ?= 60

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Run a real sentence encoder: compile, verify, embed, search, compare with ONNX Runtime
	@./demo/demo.sh

test: ## Format, lints, structure checks, Rust and Python tests, bounded fuzzing
	@./scripts/test.sh

build: ## Build the command: target/release/tw
	@./scripts/setup.sh system
	cargo build --release --locked --workspace --bin tw

wheel: ## Build the Python wheel into target/wheels (BUNDLE=1: with LLVM inside, for other machines)
	@./scripts/setup.sh system wheel
	@./scripts/wheel.sh $(if $(BUNDLE),--bundle)

test-torch: ## The tests of the PyTorch backend; installs PyTorch (several GB) into .venv-torch
	@./scripts/setup.sh system test wheel torch
	@./scripts/test.sh --only torch

test-torch-core: ## Those that fit into a few minutes: what continuous integration runs of them
	@./scripts/setup.sh system torch
	@./scripts/test.sh --only torch-core

test-jax: ## The tests of the functions for JAX; installs JAX for processors into .venv-jax
	@./scripts/setup.sh system test jax
	@./scripts/test.sh --only jax

lint: ## Format check, clippy and `cargo xtask tidy` only
	@./scripts/setup.sh system
	@./scripts/test.sh --only lint

fuzz: ## Fuzz the parsers and random graphs for SECONDS_PER_TARGET each (default 60)
	@./scripts/setup.sh system
	TILEWRIGHT_FUZZ_SECONDS=$(SECONDS_PER_TARGET) ./scripts/test.sh --only fuzz

bench: ## Compare with ONNX Runtime on exported models; writes a record under records/
	@./scripts/bench.sh

gpu-bundle: ## Pack the GPU tests and benchmarks, built, into one archive for a machine with a GPU
	@./scripts/setup.sh system
	@./scripts/gpu_bundle.sh

setup: ## Install everything the other commands need, and nothing else
	@./scripts/setup.sh system test triton

docs: ## Build the book and the API documentation; the first time installs mdbook with cargo
	@./scripts/setup.sh system docs
	mdbook build docs
	cargo doc --release --locked --no-deps --workspace

clean: ## Remove build output and the virtual environment
	rm -rf target .venv .venv-triton .venv-torch bench/models docs/book
