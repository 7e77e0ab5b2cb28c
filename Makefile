# What a developer runs and what CI runs are the same targets. `make demo` and `make test` need a Rust toolchain and a C
# compiler; if no Vulkan adapter answers, scripts/ensure-vulkan installs the software one where apt is there.

CARGO ?= cargo
DEMO_OUT ?= target/demo

.PHONY: demo test test-everything test-validation soak lint bench build

demo: build
	@scripts/demo $(DEMO_OUT)

test: build
	$(CARGO) test --release --no-fail-fast

# Likewise, with every golden from every page source under every schedule through both rings.
test-everything: build
	FULMEN_EVERYTHING=1 $(CARGO) test --release --no-fail-fast

# The transfers and the pipeline once more under the Vulkan validation layer, which must say nothing.
test-validation: build
	@scripts/test-validation

# Fifty thousand requests on a model of 0.05 M parameters, undisturbed, and starved, killed and resumed: the same answers.
SOAK_REQUESTS ?= 50000
soak: build
	FULMEN_SOAK_REQUESTS=$(SOAK_REQUESTS) $(CARGO) test --release --test cli -- soak::

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --no-deps --document-private-items

bench:
	$(CARGO) bench

build:
	@scripts/ensure-vulkan
	$(CARGO) build --release
