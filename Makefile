# The two commands of README.md, on a machine with only Python 3.11 or newer, make, gcc and git.
#   make demo   environment, corpus, then the real script at a small size, with a table at the end (about 10 minutes)
#   make test   environment, then all tests (under 8 minutes on two cores)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin/python

.PHONY: demo test golden clean

demo: $(VENV)/ready
	$(BIN) data/build_dataset.py
	$(BIN) benchmarks/demo.py $(DEMO_FLAGS)

test: $(VENV)/ready
	$(BIN) -m pytest

# The losses that tests/test_script.py compares with, after a change that is meant to alter them.
golden: $(VENV)/ready
	$(BIN) -m pytest tests/test_script.py -k golden --renew-golden

clean:
	rm -rf $(VENV) logs data/datasets data/tokenizers

# An installed torch 2.9 to 2.13 is used, not replaced, and then only what is missing is installed. Otherwise everything
# is, at the pinned versions.
$(VENV)/ready: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is Python %d.%d, 3.11 or newer is needed: make PYTHON=python3.11 ..." % sys.version_info[:2])'
	rm -rf $(VENV)
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not (2, 9) <= tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 13))' 2>/dev/null; then \
		echo "using the installed torch; installing only what is missing"; \
		$(PYTHON) -m venv --system-site-packages $(VENV) && \
		installed=$$($(BIN) -m pip list --format=freeze | sed 's/==.*//' | tr 'A-Z_' 'a-z-') && \
		missing=$$(sed 's/#.*//' requirements.txt requirements-dev.txt | grep . | while read -r pin; do \
			echo "$$installed" | grep -qx "$$(echo $${pin%%==*} | tr 'A-Z_' 'a-z-')" || echo "$$pin"; done) && \
		if [ -n "$$missing" ]; then $(BIN) -m pip install $$missing; fi; \
	else \
		$(PYTHON) -m venv $(VENV) && $(BIN) -m pip install -r requirements.txt -r requirements-dev.txt; \
	fi
	touch $@
