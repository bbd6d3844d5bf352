# `make` alone lists what there is to make.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

# The Python of .venv, and the Pythons that `make test-pythons` looks for.
PYTHON ?= python3
PYTHONS ?= 3.10 3.11 3.12 3.13
# Four tests at a time, since most wait more than they work; whoever is done takes some of another's. WORKERS= for one
# after the other.
WORKERS ?= -n 4 --dist worksteal
# What make test-cassandra runs.
CASSANDRA ?= tests/cassandra
# What make test-servers builds, at versions that do not change under our tests, and where it keeps them.
VERSITYGW := github.com/versity/versitygw/cmd/versitygw@v1.8.0
FAKE_GCS := github.com/fsouza/fake-gcs-server@v1.56.1
SEAWEEDFS := github.com/seaweedfs/seaweedfs/weed@v0.0.0-20261109003541-7506e5f91cd6
SERVERS ?= $(VERSITYGW) $(SEAWEEDFS) $(FAKE_GCS)
SERVERS_IN ?= $(HOME)/.cache/cassbackup-servers
BUILT := $(abspath $(SERVERS_IN))
# What make test-faults leaves for make scorecard, and for how long it soaks.
SCORE := $(CURDIR)/tests/.build/score
SOAK_MINUTES ?= 10
# More arguments for pytest: make test ARGS="-k restore -x"
ARGS ?=

VENV := .venv
FAST := "not slow and not by_hand and not real_server"
RUN := bash -euo pipefail -c "$$IN_A_ROOT" run
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
export PIP_USE_PEP517 := 1

.PHONY: help venv demo test test-fast test-all test-faults soak scorecard test-pythons test-cassandra servers test-servers deb test-deb lint format bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(VENV)/.stamp ## build .venv with cassbackup (editable) and what its tests need

demo: $(VENV)-demo/.stamp ## back up a small Cassandra tree into a local directory, and compare every byte
	@$(VENV)-demo/bin/python tests/demo.py

test: $(VENV)/.stamp ## run the tests on the Python of .venv: about 6 minutes on two cores
	@echo "== the tests: real inotify, hard links, kills, S3 and GCS servers on loopback; about 6 minutes on two cores"
	@$(RUN) $(VENV)/bin/python -m pytest $(WORKERS) $(ARGS)

test-fast: $(VENV)/.stamp ## the same without the slow ones: about 2 minutes
	@echo "== the tests without storms, kills, large files and long waits; about 2 minutes on two cores"
	@$(RUN) $(VENV)/bin/python -m pytest $(WORKERS) -m $(FAST) $(ARGS)

test-all: $(VENV)/.stamp ## each storm and kill forty times, half of them on a busy machine: hours
	@echo "== all tests, each storm and each kill twenty times alone and twenty times on a busy machine; some hours"
	@$(RUN) $(VENV)/bin/python -m pytest -m "" $(ARGS)

test-faults: $(VENV)/.stamp ## every fault at every place, the model, a soak, twenty mutants: about 45 minutes
	@rm -f $(SCORE)
	@echo "== each boundary, each fault, each row; SOAK_MINUTES=$(SOAK_MINUTES)"
	@FAULTS=all SCORE=$(SCORE) SOAK_MINUTES=$(SOAK_MINUTES) $(RUN) $(VENV)/bin/python -m pytest -n 2 --dist load \
	    --junitxml $(SCORE).xml $$(cd tests && ../$(VENV)/bin/python -m faults.scorecard tests) $(ARGS)

soak: $(VENV)/.stamp ## churn under random faults for SOAK_MINUTES; nothing may be lost, nothing may grow
	@SOAK_MINUTES=$(SOAK_MINUTES) $(RUN) $(VENV)/bin/python -m pytest tests/faults/test_soak.py -k a_soak $(ARGS)

scorecard: ## make test-faults, then what came of it: rows, kill points, losses, lag
	@$(MAKE) --no-print-directory test-faults || true
	@cd tests && ../$(VENV)/bin/python -m faults.scorecard show $(SCORE).xml $(SCORE)

test-pythons: $(VENV)/.stamp ## run the fast tests on every other Python found here
	@bash -euo pipefail -c "$$TEST_PYTHONS"

test-cassandra: $(VENV)/.stamp-cassandra ## run tests/cassandra on real nodes, which come from Maven Central; needs Java 17 and mvn
	$(VENV)/bin/python tests/cassandra/jars.py
	@$(RUN) $(VENV)/bin/python -m pytest $(CASSANDRA) $(ARGS)

servers:
	@bash -euo pipefail -c "$$BUILD_SERVERS"

test-servers: $(VENV)/.stamp servers ## the same program over versitygw, SeaweedFS and fake-gcs-server, which Go builds into a cache
	@CASSBACKUP_SERVERS=$(BUILT) $(RUN) $(VENV)/bin/python -m pytest $(WORKERS) -m real_server tests/test_servers.py tests/test_stores.py $(ARGS)

deb: ## build dist/*.deb for Debian and Ubuntu; root also installs what that needs
	debian/build dist

test-deb: ## build twice, lintian, and the package's whole life under a real systemd; needs root
	tests/debian/test

lint: $(VENV)/.stamp ## ruff and mypy, nothing is changed
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy --strict cassbackup.py

format: $(VENV)/.stamp ## let ruff mend imports and layout
	$(VENV)/bin/python -m ruff check --fix --select I .
	$(VENV)/bin/python -m ruff format .

bench: $(VENV)/.stamp-bench ## measure ours beside s5cmd and others, on an idle machine; versitygw joins where there is Go
	@if command -v go >/dev/null; then $(MAKE) --no-print-directory servers SERVERS='$(VERSITYGW)' || echo "versitygw is left out"; fi
	CASSBACKUP_SERVERS=$(BUILT) $(VENV)/bin/python bench/bench.py $(ARGS)

clean: ## remove all that make has made
	rm -rf $(VENV) $(VENV)-* .demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis tests/.build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each run has a temporary root of its own, so that two beside each other leave each other alone; a short one, since the
# path of a Unix socket has 107 bytes. Where a test failed it is kept.
define IN_A_ROOT
root=$$(mktemp -d /tmp/cb-XXXX) code=0
PYTEST_DEBUG_TEMPROOT=$$root "$$@" || code=$$?
if [ "$$code" = 0 ]; then rm -rf "$$root"; else echo "what the tests left behind: $$root" >&2; fi
exit "$$code"
endef
export IN_A_ROOT

define VENV_FOR_TESTS
	@bash -euo pipefail -c "$$NEW_VENV" venv $(@D) $(PYTHON)
	$(@D)/bin/python -m pip install --quiet --editable '.[test]'
	@touch $@
endef

$(VENV)/.stamp: setup.py
	$(VENV_FOR_TESTS)

$(VENV)-3.%/.stamp: setup.py
	$(VENV_FOR_TESTS)

$(VENV)/.stamp-cassandra: $(VENV)/.stamp
	$(VENV)/bin/python -m pip install --quiet --editable '.[cassandra]'
	@touch $@

$(VENV)/.stamp-bench: $(VENV)/.stamp
	$(VENV)/bin/python -m pip install --quiet --editable '.[test,bench]'
	@touch $@

# A file:// bucket needs neither boto3 nor Google's client.
$(VENV)-demo/.stamp: setup.py
	@bash -euo pipefail -c "$$NEW_VENV" venv $(@D) $(PYTHON)
	$(@D)/bin/python -m pip install --quiet requests pyinotify 'pyasyncore; python_version >= "3.12"'
	@touch $@

# Debian's python3 has no ensurepip until python3-venv is installed, so: venv, then virtualenv, then ask apt-get.
define NEW_VENV
dir=$$1 python=$$2
command -v "$$python" >/dev/null || { echo "no $$python here; on Debian: apt-get install python3 python3-venv" >&2; exit 1; }
"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "cassbackup needs Python 3.10 or newer, and $$python is $$("$$python" --version 2>&1); try: make PYTHON=python3.11" >&2; exit 1; }
works() { "$$dir/bin/python" -m pip --version; } &>/dev/null
new() { rm -rf "$$dir"; "$$python" -m venv "$$dir" &>/dev/null && works; }
other() { rm -rf "$$dir"; command -v virtualenv >/dev/null && virtualenv --quiet --python "$$python" "$$dir" && works; }
apt() {
    test "$$(id -u)" = 0 && command -v apt-get >/dev/null || return 1
    echo "installing python3-venv, which $$python lacks" >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get install -qq -y python3-venv >/dev/null 2>&1 || { apt-get update -qq && apt-get install -qq -y python3-venv >/dev/null; }
}
works || new || other || { apt && new; } || {
    "$$python" -m venv "$$dir" >&2 || true
    rm -rf "$$dir"
    echo "$$python cannot make a virtual environment. Type: sudo apt-get install python3-venv" >&2
    exit 1
}
endef
export NEW_VENV

define BUILD_SERVERS
command -v go >/dev/null || { echo "no Go here, which builds the servers; on Debian: apt-get install golang" >&2; exit 1; }
# In a module of its own: go install takes no program whose go.mod replaces another module, as that of SeaweedFS does.
build() (
    export GO111MODULE=on GOFLAGS= GOWORK=off
    folder=$$(mktemp -d)
    trap 'rm -rf "$$folder"' EXIT
    cd "$$folder"
    go mod init servers
    go get "$$1"
    go build -o "$(BUILT)/" "$${1%@*}"
)
for module in $(SERVERS); do
    name=$${module##*/} name=$${name%@*}
    test -x "$(BUILT)/$$name" || { echo "== building $$module"; build $$module; }
done
endef
export BUILD_SERVERS

# A pyenv shim may stand on PATH for a Python that it then refuses to run, so each candidate is tried.
define TEST_PYTHONS
version_of() { "$$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
find_python() {
    for candidate in $$(command -v python$$1) "$${HOME:-}"/.pyenv/versions/$$1.*/bin/python$$1; do
        if test "$$(version_of "$$candidate")" = "$$1"; then echo "$$candidate"; return; fi
    done
}
own=$$(version_of $(VENV)/bin/python) tested=
for version in $(PYTHONS); do
    test $$version != $$own || continue
    python=$$(find_python $$version)
    test -n "$$python" || { echo "== Python $$version: not found here"; continue; }
    echo "== Python $$version: $$python"
    $(MAKE) --no-print-directory $(VENV)-$$version/.stamp PYTHON="$$python"
    bash -euo pipefail -c "$$IN_A_ROOT" run $(VENV)-$$version/bin/python -m pytest $(WORKERS) -m $(FAST) $(ARGS)
    tested="$$tested $$version"
done
echo "== tested beside $$own:$${tested:- nothing, no other Python was found}"
endef
export TEST_PYTHONS
