# Everything that is done with this repository; each target installs what it needs, or says what is missing.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

CARGO ?= cargo
# Debian keeps ip, iptables and the daemons where a user's PATH does not look.
export PATH := $(PATH):/usr/sbin:/sbin
BUILT := $(or $(CARGO_TARGET_DIR),target)
# The demo shares its build with the tests; PROFILE=release takes minutes longer and shows lower latencies.
PROFILE ?= dev

# The targets of tests/Cargo.toml, in two heaps: those that need root (elsewhere they skip, and say so) and the rest.
TARGETS := $(shell sed -n '/^\[\[test\]\]/{n;s/^name = "\(.*\)"/\1/p}' tests/Cargo.toml)
ROOT_TARGETS := $(filter redirect mesh,$(TARGETS))
# A cluster takes minutes to build and seconds to bring up: it has targets of its own.
OTHER_TARGETS := $(filter-out tidy cluster $(ROOT_TARGETS),$(TARGETS))

.PHONY: help
help: ## What can be made
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

.PHONY: demo
demo: deps-demo ## A mesh of namespaces on this machine, explained step by step (ARGS="--no-tty --steps 3")
	@$(CARGO) build --locked --profile $(PROFILE) --workspace --bins
	exec $(BUILT)/$(PROFILE:dev=debug)/weft demo $(ARGS)

.PHONY: test
test: deps-test ## Every gate, cheapest first; redirect tests need root
	@gate() { printf '\n== %s\n' "$$*"; }
	gate format
	$(CARGO) fmt --all --check
	gate weft-core
	$(CARGO) test --locked --quiet -p weft-core
	gate clippy
	$(CARGO) clippy --locked --quiet --workspace --all-targets -- -D warnings
	gate tidy
	$(CARGO) test --locked --quiet -p weft-tests --test tidy
	gate workspace tests
	$(CARGO) build --locked --quiet --workspace --bins
	$(CARGO) test --locked --quiet --workspace --exclude weft-tests
	$(CARGO) test --locked --quiet -p weft-tests --lib --bins $(addprefix --test ,$(OTHER_TARGETS))
	gate documentation
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --quiet --workspace --no-deps
	gate dependencies
	make --no-print-directory deny
	gate tests in network namespaces
	if [ "$$(id -u)" != 0 ]; then echo "not root: these tests skip, and say so"; fi
	$(CARGO) test --locked -p weft-tests $(addprefix --test ,$(ROOT_TARGETS))

.PHONY: bench
bench: deps-bench ## Weft against nothing, a bare relay, Envoy, HAProxy and nginx, in one run (root; 15 minutes; ARGS=--quick: 2)
	@$(CARGO) build --locked --release -p weft-proxy -p weft-control-plane -p weft-tests --bin weft-proxy --bin weft-controller --bin weft --bin weft-bench --bin relay
	exec $(BUILT)/release/weft-bench $(ARGS)

.PHONY: bench-scale
bench-scale: deps-bench ## The controller with 10,000 simulated sidecars: memory, CPU, how long a change takes (root; ARGS=--quick)
	@$(CARGO) build --locked --release -p weft-control-plane -p weft-tests --bin weft-controller --bin weft-bench
	exec $(BUILT)/release/weft-bench scale $(ARGS)

.PHONY: instructions
instructions: deps-bench ## Instructions per request of each sidecar, by valgrind; needs no quiet machine (root; ARGS="--rules 10,100" or "--against OTHER-WEFT-PROXY")
	@$(CARGO) build --locked --release -p weft-proxy -p weft-control-plane -p weft-tests --bin weft-proxy --bin weft-controller --bin weft --bin weft-bench
	exec $(BUILT)/release/weft-bench instructions $(ARGS)

# What is judged by what it loses and not by how fast it is: these run three at a time.
OUTAGES := nothing_lost::soak delivery::soak tcp::soak faults::soak_a_black
# Release programs under the tests' ordinary build: what is judged is optimized, what judges need not be.
SOAKED := WEFT_MODEL_STEPS=100000 WEFT_PROGRAMS=$(abspath $(BUILT))/release
said_by = echo "$$(git describe --always --dirty), $$(date -u +%F)" > target/soak-$(1).log

.PHONY: soak
soak: soak-outages soak-rest soak-report ## The long outages, and tests/REPORT.md: every figure that the tests measure (root; 45 minutes on a quiet machine; WEFT_SOAK_HOURS=8)

.PHONY: soak-build
soak-build: deps-test
	@programs='weft weft-controller weft-iptables weft-proxy weft-testapp'
	$(CARGO) build --locked --release -p weft-proxy -p weft-control-plane -p weft-iptables -p weft-tests $${programs//weft/--bin weft}
	mkdir -p target

.PHONY: soak-outages
soak-outages: soak-build
	@$(call said_by,outages)
	$(SOAKED) $(CARGO) test --locked -p weft-tests --test mesh -- --include-ignored --show-output --test-threads=3 \
	  $(OUTAGES) 2>&1 | tee -a target/soak-outages.log

.PHONY: soak-rest
soak-rest: soak-build
	@$(call said_by,rest)
	$(SOAKED) $(CARGO) test --locked --workspace --lib --tests -- --include-ignored --nocapture --test-threads=1 \
	  $(addprefix --skip ,$(OUTAGES)) 2>&1 | tee -a target/soak-rest.log

.PHONY: soak-report
soak-report: ## tests/REPORT.md of what the two parts of the soak said last
	@if grep -l '^test result: FAILED' target/soak-*.log; then echo "no page: a test failed there" >&2; exit 1; fi
	{
	  echo '# What the tests measured'
	  echo
	  echo 'Written by `make soak`: release programs; the tests themselves, and what they call as a library, are a debug build.'
	  echo 'The outages ran three at a time, all else one at a time. A line stands here only if every test passed.'
	  echo
	  echo "$$(uname -srm), $$(nproc) cores. The outages: $$(head -n 1 target/soak-outages.log). All else: $$(head -n 1 target/soak-rest.log)."
	  awk -f tests/report.awk target/soak-outages.log target/soak-rest.log
	} > target/soak-report.md
	mv target/soak-report.md tests/REPORT.md

.PHONY: fuzz
fuzz: ## A minute and a new seed for each parser (ARGS="route", SECONDS_EACH=600); what fails lies in target/fuzz
	@export WEFT_FUZZ_SECONDS=$(or $(SECONDS_EACH),60) WEFT_FUZZ_SEED=$${WEFT_FUZZ_SEED:-$$(date +%s)}
	$(CARGO) test --locked --profile fuzz -p weft-tests --test fuzz -- --nocapture $(ARGS)

.PHONY: mutants
mutants: ## Changes identity and authorization piece by piece: each change must fail a test (20 minutes)
	@if ! $(CARGO) mutants --version >/dev/null 2>&1; then
	  echo "skipped: cargo-mutants is not installed (cargo install cargo-mutants --locked)"
	  exit 0
	fi
	mkdir -p target
	# Judged by the tests of that name; it builds in a folder of its own. A change may make a loop endless: a minute.
	status=0
	env -u CARGO_TARGET_DIR $(CARGO) mutants --package weft-core \
	  --file proxy/core/src/identity.rs --file proxy/core/src/authz.rs --file 'proxy/core/src/authz/*' --file proxy/core/src/path.rs \
	  --jobs 2 --minimum-test-timeout 60 --output target --colors never -- --lib -- identity authz path || status=$$?
	of() { wc -l < target/mutants.out/$$1.txt; }
	echo "figure: mutants of identity and authorization: $$(of missed) survived of $$(( $$(of missed) + $$(of caught) + $$(of timeout) )) (bound 0)"
	# 3: none survived, and some were noticed by the time they took.
	[ $$status != 3 ] || exit 0
	exit $$status

# Programs in images are static and stripped. dev is quick to build and slow to run; what is published is release.
IMAGES := target/images
IMAGED := weft-proxy weft-controller weft weft-iptables weft-echo weft-testapp
.PHONY: images
images: deps-cluster ## Images from scratch of the static programs, in target/images (PROFILE=release for real ones)
	@RUSTC_WORKSPACE_WRAPPER=$(CURDIR)/tests/cluster/static.sh $(CARGO) build --locked --quiet --profile $(PROFILE) --workspace $(IMAGED:%=--bin %) --bin weft-cluster
	mkdir -p $(IMAGES)/programs
	for program in $(IMAGED); do
	  strip -o $(IMAGES)/programs/$$program $(BUILT)/$(PROFILE:dev=debug)/$$program
	done
	$(BUILT)/$(PROFILE:dev=debug)/weft-cluster images --programs $(IMAGES)/programs --of bed
	$(BUILT)/$(PROFILE:dev=debug)/weft-cluster images --programs $(IMAGES)/programs --out $(IMAGES)

.PHONY: cluster-up
cluster-up: images ## A real Kubernetes cluster on this machine (root, Go; NODES=1, DUAL=1); says how to use it
	@exec $(BUILT)/$(PROFILE:dev=debug)/weft-cluster up --nodes $(or $(NODES),2) $(if $(DUAL),--dual)

.PHONY: cluster-down
cluster-down: ## End it, whatever state it is in, and leave nothing
	@$(CARGO) build --locked --quiet --workspace --bin weft-cluster
	exec $(BUILT)/debug/weft-cluster down

.PHONY: test-cluster
test-cluster: images ## Tests on a real cluster, which is brought up for them (root, Go; a cold build takes 10 minutes)
	@up=0
	$(BUILT)/$(PROFILE:dev=debug)/weft-cluster up --nodes 2 --dual || up=$$?
	# Without Go or its modules it said so, and there is nothing to test.
	if [ $$up = 3 ]; then exit 0; fi
	[ $$up = 0 ] || exit $$up
	status=0
	# Here there is a helm for certain.
	WEFT_HELM=required $(CARGO) test --locked --quiet -p weft-control-plane --lib cli::install || status=$$?
	$(CARGO) test --locked -p weft-tests --test cluster -- --test-threads=1 $(ARGS) || status=$$?
	$(BUILT)/$(PROFILE:dev=debug)/weft-cluster down
	exit $$status

.PHONY: conformance
conformance: ## The official Gateway API mesh suite, unmodified, on the cluster that is up (ARGS="--run-test=MeshBasic")
	@$(CARGO) build --locked --quiet --workspace --bin weft-cluster
	exec $(BUILT)/debug/weft-cluster conformance -- $(ARGS)

.PHONY: sbom
sbom: ## What each program is made of: CycloneDX in target/sbom
	@if ! $(CARGO) cyclonedx --version >/dev/null 2>&1; then
	  echo "skipped: cargo-cyclonedx is not installed (cargo install cargo-cyclonedx --locked)"
	  exit 0
	fi
	rm -rf target/sbom
	mkdir -p target/sbom
	export SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct)
	$(CARGO) cyclonedx --quiet --format json --describe binaries --target x86_64-unknown-linux-gnu
	for package in proxy control-plane iptables tests proto proxy/core; do
	  for file in $$package/*.cdx.json; do
	    case $$file in
	      proxy/*_bin* | control-plane/*_bin* | iptables/*_bin*) mv "$$file" target/sbom/ ;;
	      *) rm -f "$$file" ;;
	    esac
	  done
	done
	# The same from the same sources, wherever they lie.
	sed -i "s|file://$$PWD|file:///weft|g" target/sbom/*
	for file in target/sbom/*; do
	  echo "$$file: $$(grep -c '"purl": "pkg:cargo/' "$$file") crates"
	done

.PHONY: repro
repro: ## Builds the images twice, in two folders, and compares (half an hour)
	@sums= folders="target/repro/one target/repro/another/place"
	for folder in $$folders; do
	  rm -rf $$folder
	  mkdir -p $$folder
	  git ls-files -z | tar --null --files-from=- -c | tar -x -C $$folder
	done
	for folder in $$folders; do
	  env -u CARGO_TARGET_DIR $(MAKE) --no-print-directory -C $$folder images PROFILE=release
	  sum=$$(cd $$folder/target/images && sha256sum programs/* *.tar | sort -k 2)
	  echo "$$sum" | sed "s|^|figure: sha256 of what $$folder built: |"
	  sums="$$sums$$(echo "$$sum" | sha256sum)"$$'\n'
	  rm -rf $$folder
	done
	[ "$$(printf %s "$$sums" | sort -u | wc -l)" = 1 ] || { echo "the two differ" >&2; exit 1; }

.PHONY: fmt
fmt: ## Format everything
	@$(CARGO) fmt --all

.PHONY: deny
deny: ## Dependencies: versions with known holes, duplicates, licences, sources
	@if ! $(CARGO) deny --version >/dev/null 2>&1; then
	  echo "skipped: cargo-deny is not installed (cargo install cargo-deny --locked); the version floors are checked by tidy"
	  exit 0
	fi
	$(CARGO) deny --log-level error --offline check bans licenses sources
	# The advisories need a database from the network.
	if ! $(CARGO) deny --log-level error fetch db >/dev/null 2>&1; then
	  echo "skipped: cargo-deny's advisories, whose database cannot be had here"
	  exit 0
	fi
	$(CARGO) deny --log-level error check advisories

.PHONY: deps deps-demo deps-test deps-bench deps-cluster
deps: deps-demo deps-test deps-bench ## Debian and Python packages that demo, test and bench need
deps-demo deps-test deps-bench deps-cluster: deps-%:
	@tests/deps.sh $*
