# `make help` lists what there is. Environments are made on first use and
# kept in .venv-*; they are made again when the project's requirements change.

BACKEND ?=
DEMO_BACKEND := $(or $(BACKEND),jax)
TEST_BACKENDS := $(or $(BACKEND),jax tensorflow torch)
KNOWN := jax tensorflow torch
comma := ,
space := $(subst ,, )

DEMO := .venv-demo-$(DEMO_BACKEND)
TEST := .venv-test
PEERS := .venv-peers
DOCS := .venv-docs
# Keras' development release, unpacked; it goes before the one of $(TEST).
NIGHTLY := .keras-nightly
CODE := keras_ring tests examples benchmarks

# The first Python on the path that every backend has releases for, or else
# a newer one. Set PYTHON to choose another.
PYTHON ?= $(shell \
  for try in '3.11 3.13' '3.11 3.99'; do set -- $$try; \
    for python in python3 python3.13 python3.12 python3.11; do \
      $$python -c "import sys; f = lambda v: tuple(map(int, v.split('.'))); \
        sys.exit(not f('$$1') <= sys.version_info[:2] <= f('$$2'))" \
        2>/dev/null && { echo $$python; exit; }; \
    done; \
  done)

# `make test KERAS=nightly` runs all tests on the development release.
KERAS ?=

# Random cases of `make fuzz`, and the seed they follow from (any if empty).
N ?= 1000
SEED ?=

.PHONY: help demo test test-all fuzz lint format docs clean bench bench-peers

help: ## List the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' \
	  | awk -F'\t' '{ printf "make %-11s %s\n", $$1, $$2 }'
	@echo "demo, test, test-all, fuzz and bench take BACKEND=jax, BACKEND=tensorflow or"
	@echo "BACKEND=torch, and bench-peers the first and the last of them."
	@echo "test and test-all take KERAS=nightly, Keras' development release."

demo: known-backend $(DEMO)/ready ## Train a small language model over simulated devices
ifeq ($(DEMO_BACKEND),torch)
	KERAS_BACKEND=torch $(DEMO)/bin/python -m torch.distributed.run \
	  --standalone --nproc-per-node 2 examples/byte_language_model.py
else
	KERAS_BACKEND=$(DEMO_BACKEND) $(DEMO)/bin/python \
	  examples/byte_language_model.py
endif

# Where the development release cannot be had the quick tests on it are left
# out, and the others run: the network is no part of the project.
test: known-backend $(TEST)/ready ## Lint, check types, and test on each backend
	@status=0; \
	$(MAKE) --no-print-directory lint >$(TEST)/lint.txt 2>&1 & lint=$$!; \
	$(MAKE) --no-print-directory nightly && have=1 || have=; \
	case "$(KERAS):$$have" in \
	  :1) keras="--also $(NIGHTLY)";; \
	  :) keras=; echo "keras-nightly cannot be installed (see above): the" \
	    "quick tests on it are left out.";; \
	  nightly:1) keras="--keras $(NIGHTLY)";; \
	  *) echo "make test: FAILED: no keras-nightly (see above)"; exit 1;; \
	esac; \
	$(TEST)/bin/python -m tests $$keras $(ALL) $(TEST_BACKENDS) || status=1; \
	wait $$lint || status=1; cat $(TEST)/lint.txt; \
	if [ $$status = 0 ]; then echo "make test: passed"; \
	else echo "make test: FAILED (see above)"; fi; \
	exit $$status

test-all: ALL := --all
test-all: test ## The same with every combination of the tests' parameters

# A new one each day. What it needs beside Keras is in $(TEST).
.PHONY: nightly
nightly: $(TEST)/ready
	@test -n "$$(find $(NIGHTLY)/keras -maxdepth 0 -mtime -1 2>/dev/null)" \
	|| { rm -rf $(NIGHTLY).new; $(TEST)/bin/python -m pip install --quiet \
	  --disable-pip-version-check --retries 1 --no-deps --pre \
	  --target $(NIGHTLY).new keras-nightly \
	  && touch $(NIGHTLY).new/keras && rm -rf $(NIGHTLY) \
	  && mv $(NIGHTLY).new $(NIGHTLY); }

fuzz: known-backend $(TEST)/ready ## Compare N=1000 random cases with the oracle (SEED=...)
	@status=0; for backend in $(TEST_BACKENDS); do \
	  KERAS_BACKEND=$$backend $(TEST)/bin/python -m tests.fuzz --cases $(N) \
	    $(if $(SEED),--seed $(SEED)) || status=1; \
	done; exit $$status

bench: known-backend $(TEST)/ready ## Measure the package (README: what is left out); reports go to docs/reports
	$(TEST)/bin/python -m benchmarks $(TEST_BACKENDS)

bench-peers: known-backend $(TEST)/ready $(PEERS)/ready ## Measure against other rings, in .venv-peers
	$(TEST)/bin/python -m benchmarks.peers \
	  $(if $(BACKEND),--backends $(subst $(space),$(comma),$(BACKEND)))

lint: $(TEST)/ready ## Check style, format and types
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy

format: $(TEST)/ready ## Put every file into the project's format
	$(TEST)/bin/ruff check --fix .
	$(TEST)/bin/ruff format .

docs: $(DOCS)/ready ## Build the documentation as a site: out/site/index.html
	PYTHONDONTWRITEBYTECODE=1 $(DOCS)/bin/python -m mkdocs build --strict

clean: ## Remove the environments and everything that was made
	rm -rf .venv-* $(NIGHTLY)* build dist out *.egg-info
	rm -rf .pytest_cache .ruff_cache .mypy_cache
	find $(CODE) -name __pycache__ -prune -exec rm -rf {} +

.PHONY: known-backend
known-backend:
	@case "$(KERAS)" in ''|nightly) ;; *) \
	  echo "KERAS must be nightly, or left out. Received: $(KERAS)."; exit 2;; \
	esac
	@for name in $(BACKEND); do case " $(KNOWN) " in *" $$name "*) ;; *) \
	  echo "BACKEND must be one of: $(KNOWN). Received: $$name."; exit 2;; \
	esac; done

.venv-demo-torch/ready .venv-test/ready: TORCH := -r requirements/torch.txt
.venv-demo-%/ready: EXTRAS = $*,examples
.venv-test/ready: EXTRAS := jax,tensorflow,torch,dev
$(DOCS)/ready: EXTRAS := docs

.venv-demo-%/ready: pyproject.toml requirements/torch.txt
	$(make-environment)

.venv-test/ready: pyproject.toml requirements/torch.txt
	$(make-environment)

$(DOCS)/ready: pyproject.toml
	$(make-environment)

# The peers' own, with their TPU compiler: they are installed without what
# they ask for, which would bring other builds of the frameworks.
$(PEERS)/ready: requirements/torch.txt requirements/peers.txt requirements/peers-need.txt
	$(need-python)
	@rm -f $@
	@$(PYTHON) -m venv $(@D) || { rm -rf $(@D); exit 1; }
	$(@D)/bin/python -m pip install -r requirements/torch.txt
	$(@D)/bin/python -m pip install -r requirements/peers-need.txt
	$(@D)/bin/python -m pip install --no-deps -r requirements/peers.txt
	@touch $@

define need-python
@if [ -z "$(PYTHON)" ]; then \
  echo "keras_ring needs Python 3.11 or newer, and none of python3,"; \
  echo "python3.13, python3.12, python3.11 on the path is one"; \
  echo "(python3 is: $$(python3 --version 2>&1 || true))."; \
  echo "Install one, or name it: make PYTHON=/path/to/python3.12 ..."; \
  exit 1; \
fi
endef

define make-environment
$(need-python)
@echo "Making the environment $(@D) with $(PYTHON); the first time this"
@echo "downloads packages and takes minutes."
@rm -f $@
@$(PYTHON) -m venv $(@D) || { rm -rf $(@D); \
  echo "$(PYTHON) cannot make an environment; on Debian and Ubuntu:"; \
  echo "apt-get install python3-venv"; exit 1; }
@$(if $(TORCH),$(@D)/bin/python -m pip install $(TORCH))
$(@D)/bin/python -m pip install --editable '.[$(EXTRAS)]'
@touch $@
endef
