# Each target works alone on a fresh machine with Python 3.11, pip and make: it makes its own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help demo test test-nightly deploy-check deploy-test lint bench bench-media bench-throughput format clean
help:
	@echo "make demo          train on handwritten digits with two processes, into one offline wandb run"
	@echo "make test          all tests but the long forms of the fault tests, and what needs a GPU or really deploys"
	@echo "make test-nightly  the long forms of the fault tests too"
	@echo "make deploy-check  units, scripts, images and manifests judged by what reads them; seconds"
	@echo "make deploy-test   systemd booted, containers and pods run, a SLURM, MPIs, Ray, a network that is cut,"
	@echo "                   256 sessions: as root on Debian 12"
	@echo "make bench         the cost of log(), beside wandb.log, SummaryWriter and no logging; that it waits for"
	@echo "                   nobody, whatever is broken; what a worker costs beside the calls; and then bench-media"
	@echo "make bench-media   the cost of logging an image, a large tensor and a checkpoint, and of watch()"
	@echo "make bench-throughput  how much the daemon takes, and how fast it hands it on"
	@echo "make lint          ruff, mypy --strict, import-linter"

# test holds everything demo holds, so a test environment serves the demo as well.
$(VENV)/.demo: pyproject.toml
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@[ -e $(VENV)/.test ] || $(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[test]'
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python client/examples/demo.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 4 --dist loadscope -m "not gpu and not nightly and not deploy"

test-nightly: $(VENV)/.test
	$(BIN)/python -m pytest -m "not gpu and not deploy"

# What can be said of deploy/ without deploying it; the tools come with it.
deploy-check: $(VENV)/.test
	$(PIP) -e '.[deploy-check]'
	$(BIN)/python -m pytest tests/deploy/test_files.py -q -rs

# Many sessions, direct and through relays; then deployments, and nodes whose network is cut. Says at its end what
# it skipped, and why: which package has what is not here.
deploy-test: $(VENV)/.test
	$(PIP) -e '.[deploy-test]'
	$(BIN)/python -m tests.benchmarks.sessions --sessions 256 --seconds 10 --compare 8 && load=0 || load=$$?; \
	$(BIN)/python -m pytest tests/deploy tests/chaos/test_nodes_apart.py -v -rs && tests=0 || tests=$$?; \
	exit $$((load | tests))

bench: $(VENV)/.test
	$(BIN)/python -m tests.benchmarks.hot_path && hot=0 || hot=$$?; \
	$(BIN)/python -m tests.benchmarks.never_blocks && never=0 || never=$$?; \
	$(BIN)/python -m tests.benchmarks.worker_cost && worker=0 || worker=$$?; \
	$(MAKE) --no-print-directory bench-media && media=0 || media=$$?; \
	exit $$((hot | never | worker | media))

bench-media: $(VENV)/.test
	$(BIN)/python -m tests.benchmarks.media_cost && media=0 || media=$$?; \
	$(BIN)/python -m tests.benchmarks.tensors && tensors=0 || tensors=$$?; \
	$(BIN)/python -m tests.benchmarks.checkpoint && checkpoint=0 || checkpoint=$$?; \
	exit $$((media | tensors | checkpoint))

bench-throughput: $(VENV)/.test
	$(BIN)/python -m tests.benchmarks.throughput

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache sidestep-runs
