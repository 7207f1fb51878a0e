# make demo       train with and without keras_stab, print a table, draw it
# make test       install everything and run the suite on the three backends
# make test-all   the same with the slow tests
# make benchmark  step times against the stock Keras step
# make stability  which method helps, hours; DATA=folder with the data sets
# make docs       the site with all pages and the reference, in build/docs
# make guides     every guide in full; DATA=folder with the data sets
# make support    the tables of guides/support.md and many_devices.md
# KERAS_BACKEND=torch make demo   picks the backend (jax, tensorflow, torch)

PYTHON ?= python3
BACKENDS ?= tensorflow jax torch
DEMO_BACKEND := $(or $(KERAS_BACKEND),jax)
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
# Two processes; more gain nothing where the backends use every core. By group,
# mostly a file: see `tests/conftest.py`.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadgroup
# After one that failed too, so that one run shows all failures.
define on_each_backend
@failed=; for backend in $(BACKENDS); do \
  echo "== $$backend"; \
  KERAS_BACKEND=$$backend $(1) || failed="$$failed $$backend"; \
done; \
test -z "$$failed" || { echo "Tests failed on$$failed"; exit 1; }
endef
# Each guide and the data that it wants, below the folder `DATA`.
GUIDES := demo averaging:fashion_mnist flat_minima:fashion_mnist \
  large_batch:fashion_mnist faster_pretraining:tinyshakespeare/input.txt \
  fine_tuning:glue/SST-2 did_it_help:fashion_mnist min_max \
  gan:fashion_mnist spikes:fashion_mnist pictures
export TF_CPP_MIN_LOG_LEVEL := 3

.PHONY: demo test test-all benchmark stability docs guides support lint clean
.DELETE_ON_ERROR:

demo: .venv/demo-$(DEMO_BACKEND)
	KERAS_BACKEND=$(DEMO_BACKEND) $(BIN)/python guides/demo.py

test: .venv/test lint docs
	$(call on_each_backend,$(PYTEST) -m "not slow")

test-all: .venv/test lint docs
	$(call on_each_backend,HYPOTHESIS_PROFILE=search $(PYTEST))

benchmark: .venv/test
	$(BIN)/python benchmarks/step_time.py

stability: .venv/test
	$(BIN)/python benchmarks/stability_study.py \
	  $(if $(DATA),--data "$(DATA)") $(STABILITY)

docs: .venv/test
	$(BIN)/python docs/build.py

guides: .venv/test
	@test -d "$(DATA)" || { echo "make guides DATA=folder, with the data sets" \
	  "in folders of their names: $(GUIDES)"; exit 1; }
	mkdir -p build/guides
	@set -e; cd build/guides; for guide in $(GUIDES); do \
	  name=$${guide%%:*}; data=$${guide#$$name}; echo "== $$name"; \
	  KERAS_BACKEND=$(DEMO_BACKEND) ../../$(BIN)/python \
	    ../../guides/$$name.py \
	    $${data:+--data "$(abspath $(DATA))/$${data#:}"}; \
	done

support: .venv/test
	@set -e; for backend in $(BACKENDS); do \
	  echo "== $$backend"; \
	  KERAS_BACKEND=$$backend $(PYTEST) tests/test_contract.py \
	    --record-support=build/support/$$backend.json; \
	done
	$(BIN)/python tests/support.py build/support/*.json \
	  --output guides/support.md
	$(BIN)/python tests/many_devices.py

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "keras_stab needs Python 3.11 or newer: make PYTHON=python3.12"; \
	    exit 1; }
	$(PYTHON) -m venv .venv
	touch $@

.venv/demo-%: .venv/python pyproject.toml constraints.txt
	@echo "Installing keras_stab and $*"
	$(INSTALL) --editable ".[$*,demo]"
	touch $@

.venv/test: .venv/python pyproject.toml constraints.txt
	@echo "Installing keras_stab and the three backends"
	$(INSTALL) --editable ".[tensorflow,jax,torch,demo,docs,test]"
	touch $@

clean:
	rm -rf .venv
