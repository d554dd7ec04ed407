# The two commands of README.md, on a machine with only Python 3.11 or newer, make, gcc and git.
#   make demo   environment, corpus, then the real script at a small size, with a table at the end (5 to 8 minutes)
#   make test   environment, then all tests (about 6 minutes on two cores)
#   make soak   the long ones: random kills, hanging ranks, 100,000 hostile files for each loader (more than an hour)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin/python

.PHONY: demo test soak env golden clean

demo: env
	$(BIN) data/build_dataset.py
	$(BIN) benchmarks/demo.py $(DEMO_FLAGS)

test: env
	OMP_NUM_THREADS=1 $(BIN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: env
	$(BIN) -m pytest -m soak
	FUZZ_INPUTS=100000 MUTATIONS=100000 $(BIN) -m pytest tests/test_hostile.py tests/test_artifact.py -k "declared or mutated"

# The losses that tests/test_script.py compares with, after a change that is meant to alter them.
golden: env
	$(BIN) -m pytest tests/test_script.py -k golden --renew-golden

# Only what the two commands made: other data sets and runs stay.
clean:
	rm -rf $(VENV) .pytest_cache logs/demo_seed* data/datasets/pydocs_sp1024 data/tokenizers/pydocs_1024_bpe.model

env: $(VENV)/ready

# An installed torch 2.9 to 2.14 is used, not replaced, and then only what is missing is installed. Otherwise everything
# is, at the pinned versions. The .pth file is for a $(PYTHON) that is itself in a virtual environment: a new one made
# with --system-site-packages sees the packages of the base Python only.
$(VENV)/ready: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is Python %d.%d, 3.11 or newer is needed: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	@test ! -e $(VENV) -o -e $(VENV)/made-here || { echo "error: $(VENV) was not made by this Makefile: remove it, or make VENV=another ..."; exit 1; }
	rm -rf $(VENV)
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not (2, 9) <= tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 14))' 2>/dev/null; then \
		echo "using the installed torch; installing only what is missing"; \
		$(PYTHON) -m venv --system-site-packages $(VENV) && touch $(VENV)/made-here && \
		site='import sysconfig; print(sysconfig.get_path("purelib"))' && \
		$(PYTHON) -c "$$site" > "$$($(BIN) -c "$$site")/parent.pth" && \
		installed=$$($(BIN) -m pip list --format=freeze | sed 's/==.*//' | tr 'A-Z_' 'a-z-') && \
		missing=$$(sed 's/#.*//' requirements.txt requirements-dev.txt | grep . | while read -r pin; do \
			echo "$$installed" | grep -qx "$$(echo $${pin%%==*} | tr 'A-Z_' 'a-z-')" || echo "$$pin"; done) && \
		if [ -n "$$missing" ]; then $(BIN) -m pip install $$missing; fi; \
	else \
		$(PYTHON) -m venv $(VENV) && touch $(VENV)/made-here && \
		$(BIN) -m pip install -r requirements.txt -r requirements-dev.txt; \
	fi
	touch $@
