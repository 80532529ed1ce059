# `make run` shows a container in its own kernel; `make test` runs every check and test; `make help` lists the rest.
# Each step does only what is not done already. The work is in scripts/ and guest/, in files that also work alone.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.DEFAULT_GOAL := help
export PATH := $(HOME)/.cargo/bin:$(PATH)
# Where rustup does not have the compiler of rust-toolchain.toml.
toolchain := $(shell scripts/toolchain)
ifneq ($(toolchain),)
export RUSTUP_TOOLCHAIN := $(toolchain)
endif

PREFIX ?= /usr/local
SYSCONFDIR ?= /etc
DESTDIR ?=
# What the lock file says is what is built where nobody watches.
CARGO_FLAGS ?= $(if $(CI),--locked)
export CARGO_FLAGS

ARCH := $(shell uname -m)

.PHONY: run test bench dist build agent guest kernels kernel-um kernel-$(ARCH) stage node-image install uninstall lab test-kubernetes \
  strangers fuzz clean help

run: setup-run stage ## run a container beside the host (builds all that is missing)
	@scripts/demo

test: setup-test dist ## every check and every test
	@scripts/test

bench: setup-bench stage kernel-$(ARCH) ## measure against runc; results in bench/results
	@scripts/bench

build: ## the host's executable
	@file=$$(scripts/timed hull '5 min' 'building hull' -- scripts/build-hull) && scripts/stage hull "$$file"

agent: ## the guest's executable and the initramfs that holds it
	@file=$$(scripts/timed agent '3 min' 'building the agent' -- scripts/build-agent) && scripts/stage agent "$$file"

kernel-um: ## the guest kernel for machine kind uml
	@directory=$$(guest/kernel/build um) && scripts/stage kernel um "$$directory"

kernel-$(ARCH): ## the guest kernel for machine kind qemu
	@directory=$$(guest/kernel/build $(ARCH)) && scripts/stage kernel $(ARCH) "$$directory"

kernels: kernel-um kernel-$(ARCH) ## the guest kernels for all machine kinds

guest: agent kernel-um ## all that runs in a guest, for machine kind uml

stage: build agent kernel-um ## hull and its guest files, as an installation has them: target/stage

dist: stage kernel-$(ARCH) ## a Debian package and a tarball, with checksums: target/dist
	@scripts/dist

node-image: stage ## an image that installs hull on the nodes of a Kubernetes: target/dist
	@scripts/node-image target/dist/hull-node.tar

install: stage ## into $(DESTDIR)$(PREFIX)
	@scripts/install '$(DESTDIR)' '$(PREFIX)' '$(SYSCONFDIR)'

uninstall: ## what install put there, and nothing else
	@scripts/install --remove '$(DESTDIR)' '$(PREFIX)' '$(SYSCONFDIR)'

test-kubernetes: setup-test stage ## tests of pods in a real Kubernetes, which is built the first time (a quarter of an hour)
	@scripts/kubernetes

lab: setup-test stage kernel-$(ARCH) ## the core of the tests on an emulated host with KVM, under Debian 12's kernel
	@scripts/test lab

strangers: setup-test stage ## the newest engines, and other projects' test suites in containers; takes hours
	@scripts/test newest
	@scripts/strangers

fuzz: ## each fuzz target for a minute (SECONDS_EACH=60)
	@scripts/fuzz

clean: ## what was built here; guest kernels stay in their cache
	@rm -rf target

help: ## this list
	@sed -n 's/^\([a-z][a-z-]*\)\(-$$(ARCH)\)\{0,1\}:[^#]*## /\1\2\t/p' Makefile | sed 's/-$$(ARCH)/-$(ARCH)/' | \
	  while IFS=$$'\t' read -r target what; do printf '  make %-16s %s\n' "$$target" "$$what"; done

.PHONY: setup-run setup-test setup-bench
setup-run setup-test setup-bench: setup-%:
	@scripts/setup $*
