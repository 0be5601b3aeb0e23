# `make` alone prints the targets: every line of the form "target: … ## text".

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

LINTER_VERSION := v2.15.0
VULN_VERSION := v1.9.0
LINTER := .bin/golangci-lint-$(LINTER_VERSION)

# The database of `make vuln`, if it isn't that of the Go project: file:///path, say.
VULN_DB ?=

# How long `make fuzz` gives each target.
FUZZTIME ?= 10s
# How long `make chaos` makes faults.
CHAOS ?= 5m
# How long `make soak` sends requests.
SOAK ?= 10m
# How many packages `make test` tests at once. Most of them start servers, and some look at
# the clock.
PARALLEL ?= 1
# Never from the cache: tests of the built binary depend on more than Go sees.
TEST := go test -count=1
# More arguments of the program: make up ARGS='--backend http://127.0.0.1:11434'
ARGS ?=

.PHONY: help
help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: up
up: ## run everything in one process; ARGS='…' adds flags
	go run . up $(ARGS)

.PHONY: demo
demo: ## run the demo model by itself, for load tests and fault tests
	go run . demo $(ARGS)

.PHONY: topology
topology: ## run docker-compose.yml as plain processes, without Docker
	go run ./internal/topology $(ARGS)

.PHONY: build
build: ## build ./ownllm
	go build -o ownllm .

.PHONY: test
test: setup vet lint cross ## everything, on real parts; installs what that needs
	$(TEST) -race -p $(PARALLEL) -timeout 45m ./...

.PHONY: check
check: format vet lint ## the gate before a commit: format, vet, linter, short tests of each package
	$(TEST) -short -p $(PARALLEL) $$(go list ./... | grep -v /internal/e2e)

.PHONY: setup
setup: ## install what the tests need
	scripts/setup

.PHONY: format
format: ## fail if a file isn't formatted
	@files=$$(gofmt -l .); [[ -z $$files ]] || { echo "not formatted, run gofmt -w:" $$files >&2; exit 1; }

.PHONY: vet
vet: ## go vet
	go vet ./...

.PHONY: lint
lint: $(LINTER) ## golangci-lint, at the pinned version
	$(LINTER) run ./...

$(LINTER):
	GOBIN=$(CURDIR)/.bin go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(LINTER_VERSION)
	mv .bin/golangci-lint $@

.PHONY: cross
cross: ## see that it builds for other systems: workers run on them
	GOOS=darwin go build -o /dev/null .
	GOOS=windows go build -o /dev/null .

.PHONY: fuzz
fuzz: ## every fuzz target, for FUZZTIME (10s) each
	@grep -ro --include='*_test.go' --exclude-dir=scripts '^func Fuzz[A-Za-z]*' . | while IFS=: read -r file target; do \
		echo "$${file%/*} $${target#func }"; \
		go test "$${file%/*}" -run '^$$' -fuzz "^$${target#func }$$" -fuzztime $(FUZZTIME); \
	done

.PHONY: bench
bench: ## what the broker costs: requests against direct ones, admissions against bare UPDATEs
	go run ./internal/bench $(ARGS)

.PHONY: chaos
chaos: ## three nats-servers, Postgres and all roles fail, one after the other, under mixed load, for CHAOS (5m)
	$(TEST) -race -v -timeout 6h ./internal/e2e -run '^TestChaos$$' -chaos $(CHAOS)

.PHONY: upgrade
upgrade: ## everything replaced by the next release, one process after the other, under load; the queue's leader killed
	OWNLLM_FULL=1 $(TEST) -race -v -timeout 30m ./internal/e2e -run '^(TestRollingUpgrade|TestQueueLosesItsLeader)$$'

.PHONY: soak
soak: ## as many requests as the machine takes, for SOAK (10m): does anything grow with them?
	$(TEST) -v -timeout 6h ./internal/e2e -run '^TestSoak$$' -soak $(SOAK)

.PHONY: limits
limits: ## limits under load, edges killed and frozen, the database gone: as often as it takes to believe it
	OWNLLM_FULL=1 $(TEST) -race -v -timeout 60m ./internal/e2e \
		-run 'TestLimitsOverThreeEdges|TestEveryTokenIsAccountedFor|TestKilledEdgesLeakNothing|TestFrozenEdgesDeliverNothingUnbilled|TestPostgresAway'

.PHONY: failover
failover: ## 200 workers killed in mid-stream, and a real model that dies in its reply
	OWNLLM_FULL=1 $(TEST) -run "TestFailover|TestRealModelIsContinued" -timeout 30m -v ./internal/e2e

.PHONY: vuln
vuln: ## govulncheck, at the pinned version; it needs the network, or VULN_DB
	go run golang.org/x/vuln/cmd/govulncheck@$(VULN_VERSION) $(if $(VULN_DB),-db $(VULN_DB)) -test ./...

.PHONY: clean
clean: ## remove what was built and installed here
	rm -rf ownllm .bin scripts/.venv scripts/sdk/node/node_modules scripts/nats/node_modules
