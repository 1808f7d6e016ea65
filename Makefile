# make demo · make test · make lint · make bench · make soak. Each sets up what it needs; nothing is installed outside VENV
# but Debian's Slurm packages, by `make test`, and those only as root.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export TEXT ?=
export FOLDER ?= demo
# Three files at a time keep two cores busy, since many tests wait for Slurm; the short tests of the launcher come last.
TESTS ?= tests/megatron_mixtral tests/golden tests/gpu tests/slurm $(wildcard tests/test_*.py) tests/launcher
WORKERS ?= 3
# COVERAGE=1 also reports which lines ran, in the tests' own processes and in those that they start; what measures time
# or memory is left out then.
COVERED := $(if $(COVERAGE),--cov --cov-report=term:skip-covered -m "not soak and not alone")
BENCH ?= $(wildcard tests/bench/bench_*.py)

# Without a GPU the CPU build of torch is enough; with one, pip's default build is the right one.
CPU_ONLY := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt)
DEBIAN := slurmctld slurmd slurm-client munge slurmdbd mariadb-server openssh-client openssh-server rsync chromium

.PHONY: setup demo test soak bench lint format debian clean

setup: $(VENV)/.installed

$(VENV)/.installed: setup.cfg constraints.txt constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "error: python3 -m venv failed; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@echo "installing mixlaunch into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(CPU_ONLY) -e '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/mixlaunch demo --folder "$$FOLDER" $${TEXT:+--text "$$TEXT"}

test: setup debian
	@$(if $(filter file,$(origin TESTS)),echo "All tests take about 20 minutes on two cores; a line says every 15 seconds what runs.")
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25 $(COVERED) $(TESTS)

# What takes too long for every change: run before a release.
soak: setup debian
	@$(BIN)/python -m pytest -m soak --timeout 3600 tests

# Each prints its figures beside its rival's, from one run on this machine.
bench: setup debian
	@set -e; for script in $(BENCH); do echo "== $$script"; $(BIN)/python $$script; done

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo --no-cache

format: setup
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

# The tests on a real Slurm need its daemons, those of submission from a laptop an sshd, the chat page's a browser.
# Without the right to install them those tests are skipped, visibly.
debian:
	@if dpkg -s $(DEBIAN) >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "installing Debian packages: $(DEBIAN)"; \
	  apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
	    apt-get -qq install -y --no-install-recommends $(DEBIAN) >/dev/null; \
	else \
	  echo "Some of these Debian packages are missing and this user can't install them: their tests are skipped."; \
	  echo "To run them: sudo apt-get install --no-install-recommends $(DEBIAN)"; \
	fi

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .coverage*
