# The front door. Each target installs what it lacks (tests/scripts/bootstrap.sh) and shows what it does.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help build release build-native build-gpu demo demo-experts demo-split bench-split lengths-split bench-experts test test-fast lint deny bench bench-ledger fuzz-ledger sim fuzz clean-cache test-conformance test-acme bench-api bench-tiny test-wallet bench-wallet

ENV := . tests/scripts/env.sh;
# Benches measure what a node for money runs.
RELEASED := $(ENV) export SATGRID_BIN="$${CARGO_TARGET_DIR:-$$PWD/target}/release/satgrid";

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## build the shipped binaries, satgrid and satgrid-ledger
	@tests/scripts/build.sh

release: ## the same optimised across crates, for a node that runs for money: into target/release (docs/operating/provider.md)
	@tests/scripts/build.sh release

build-native: ## the same with llama.cpp compiled for this very processor (AVX-512, VNNI, AMX): into target/native (docs/operating/provider.md)
	@tests/scripts/build-native.sh

build-gpu: ## satgrid with backends loaded at run time, and those this machine can compile (docs/operating/gpu.md)
	@tests/scripts/build-gpu.sh

demo: build ## a whole market on this machine: chain, relay, two providers, a paid chat, the bill (KEEP=1 leaves it running)
	@tests/scripts/model.sh >/dev/null
	@$(ENV) exec "$$SATGRID_BIN" devnet demo $(if $(filter-out 0,$(KEEP)),--keep)

demo-split: build ## one model over a lead and three paid workers as processes: the plan, the answer, its proof (KILL=1 kills a worker, SLOW=1 makes one far slower than it lists)
	@$(ENV) exec tests/scripts/demo-split.py --model "$$(tests/scripts/model.sh)" $(if $(filter-out 0,$(KILL)),--kill) $(if $(filter-out 0,$(SLOW)),--slow)

lengths-split: build ## prompts of 1 to 2,000 tokens over a lead and paid workers, eight sessions at once, each held against one machine (KILL=1 kills a worker)
	@$(ENV) exec tests/scripts/lengths-split.py $(if $(filter-out 0,$(KILL)),--kill) $(ARGS)

bench-split: release ## what a split by layers costs: rings of 1 to 3 workers at 0 to 50 ms beside one machine, llama.cpp's RPC and the peer's law (ARGS="--workers 2 --rtt 20")
	@$(RELEASED) exec tests/scripts/bench-split.py --out .bench-split.json $(ARGS)

bench-experts: release ## what a split by experts costs: a lead and three paid workers beside one machine, over links with a delay (ARGS="--rtt 0.1,5 --batch 1,8")
	@$(RELEASED) exec tests/scripts/bench-experts.py --out .bench-experts.json $(ARGS)

demo-experts: build ## a mixture of experts over a lead and three paid workers as processes: the map, the answer, its proof (KILL=1 kills a worker, LIE=1 makes one lie, STAGE=1: a paid stage buys the experts of its layers)
	@$(ENV) exec tests/scripts/demo-experts.py $(if $(filter-out 0,$(KILL)),--kill) $(if $(filter-out 0,$(LIE)),--lie) $(if $(filter-out 0,$(STAGE)),--stage)

test: ## everything that must hold; what CI runs
	@tests/scripts/test.sh

test-fast: ## format, clippy and tests of the light crates: seconds once built
	@tests/scripts/test.sh fast

test-wallet: ## real Lightning nodes: conformance, just-in-time channels, kill -9, apps (KILLS=100 for the long trials, BITCOIND=path for a real chain)
	@tests/scripts/wallet.sh

test-conformance: build ## clients written elsewhere against the built binary: OpenAI's SDKs, LiteLLM, LangChain, the AI SDK, OpenAI's schema (ONLY=node for one)
	@tests/scripts/conformance.sh $(ONLY)

test-acme: ## the front door's certificate against Let's Encrypt's test server, pebble, out of Debian's package
	@$(ENV) exec tests/scripts/acme.sh

lint: ## rustfmt and clippy, warnings are errors
	@tests/scripts/bootstrap.sh build
	@tests/scripts/lint.sh format
	@tests/scripts/lint.sh light
	@tests/scripts/lint.sh heavy

deny: ## licences, banned crates, sources; advisories where reachable
	@tests/scripts/deny.sh

bench: release ## speed and memory of the release build, printed as ratios from one run
	@tests/scripts/model.sh >/dev/null
	@$(RELEASED) exec cargo test --release $$LOCKED -p satgrid-tests --test bench -- --ignored --test-threads 1 --nocapture

bench-api: release ## the API beside llama.cpp's own server in one run: 1, 8 and 16 streams, first token, memory, 200 requests a second
	@tests/scripts/model.sh >/dev/null
	@$(RELEASED) exec tests/scripts/bench-api.sh

bench-tiny: release ## 200 tiny completions a second through a whole node with the toy engine, beside a bare handler (RATE=100 SECONDS_EACH=30 PAID=1)
	@$(RELEASED) export RATE="$(or $(RATE),200)" SECONDS_EACH="$(or $(SECONDS_EACH),10)" PAID="$(or $(PAID),0)"; \
	exec cargo test --release $$LOCKED -p satgrid --bin satgrid -- --ignored --exact --nocapture commands::demo::on_toy::tiny_completions_at_a_fixed_rate

bench-ledger: ## the ledger's speed: verify a million receipts, ten million appends, proofs (RECEIPTS=100000 GROWTH=1000000 for a short run)
	@$(ENV) SATGRID_BENCH_RECEIPTS="$(or $(RECEIPTS),1000000)" cargo test --release $$LOCKED -p satgrid-ledger-cli --test bench -- --ignored --nocapture
	@$(ENV) SATGRID_BENCH_GROWTH="$(or $(GROWTH),10000000)" cargo test --release $$LOCKED -p satgrid-ledger-sqlite --test bench --test journal -- --ignored --nocapture --test-threads 1 proofs_from growth_of append_rate
	@$(ENV) BENCH_ONLY=journal exec cargo test --release $$LOCKED -p satgrid-tests --test bench -- --ignored --nocapture

fuzz-ledger: ## every single flipped bit of bundles and claims (minutes); of given exports: FILES="a.bundle b.bundle" (STEP=97 for a slice)
	@$(ENV) if [ -z "$(FILES)" ]; then exec cargo test $$LOCKED -p satgrid-ledger --lib whole_ -- --ignored --nocapture; fi; \
		SATGRID_FLIP_FILES="$(abspath $(FILES))" SATGRID_FLIP_STEP="$(or $(STEP),1)" exec cargo test $$LOCKED -p satgrid-ledger-cli --test flips -- --ignored --nocapture

bench-wallet: ## what a payment costs in time, against ldk-node alone in the same run
	@tests/scripts/wallet.sh bench

sim: ## the whole market in virtual time (SEEDS=0..200, or one seed with its trace: SEEDS=7)
	@$(ENV) SATGRID_SEEDS="$(or $(SEEDS),0..200)" exec cargo test $$LOCKED -p satgrid-tests --test sim -- --nocapture

fuzz: ## decoders under damaged bytes, SECONDS_EACH (60) for each target, a new seed each time (SEED=7 repeats one)
	@$(ENV) SATGRID_FUZZ_SECONDS="$(or $(SECONDS_EACH),60)" SATGRID_FUZZ_SEED="$(or $(SEED),$$(date +%s))" exec cargo test $$LOCKED -p satgrid-tests --test fuzz -- --nocapture --test-threads 2

clean-cache: ## remove the cache: tools, models, CI's target folder (not ./target)
	rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/satgrid"
