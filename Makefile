# The two commands that do everything on a fresh machine: `make demo` and `make test`.
# They make their own environments; PYTHON chooses the interpreter (3.11 is what the pinned torch is tested with).

PYTHON ?= python3
PEERS := .venv-peers
ifdef COMFYUI_PATH
# An environment for each ComfyUI, by its own requirements. There is a stand-in for torchaudio, see demo/launch.py.
REQUIREMENTS := $(COMFYUI_PATH)/requirements.txt
VENV := .venv-$(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' $(COMFYUI_PATH)/comfyui_version.py)
NEEDS = '.[dev,demo]' -r $(VENV)/requirements.txt
else
VENV := .venv
NEEDS = '.[dev,demo,comfyui]'
endif
# FRONT_END=1.58.1 takes that version of ComfyUI's page in place of its own.
ifdef FRONT_END
PAGE := .cache/front-end-$(FRONT_END)
export FRONT_END_ROOT := $(CURDIR)/$(PAGE)/comfyui_frontend_package/static
endif
# Threads that wait asleep: waiting awake costs a busy machine more than it brings a quiet one.
export OMP_WAIT_POLICY ?= PASSIVE

PIP := -m pip install --quiet --disable-pip-version-check -c constraints.txt
OR_SAY = || { echo "The environment was not made. It takes Python 3.11 with venv (PYTHON=$(PYTHON) is used) and PyPI:" \
	"put right what is said above and run make again." >&2; exit 1; }

.PHONY: demo demo-merge ui test lint test-core test-comfy test-nodes test-browser test-release chromium clean

demo: $(VENV)/.ready
	$(VENV)/bin/python -m demo

# Two LoHas as one: which ways of merging keep what both have learnt.
demo-merge: $(VENV)/.ready
	$(VENV)/bin/python -m demo.merge

ui: $(VENV)/.ready
	$(VENV)/bin/python -m demo --ui

# Two suites at a time, longest first. Each is heard when it is done, those that failed at the end.
SUITES := test-core test-nodes test-browser test-release lint
FAILED := .cache/failed

test: $(VENV)/.ready $(PEERS)/.ready $(PAGE) chromium
	@rm -rf $(FAILED) && mkdir -p $(FAILED)
	@$(MAKE) --keep-going --silent --jobs=2 $(SUITES:%=heard-%); status=$$?; cat $(FAILED)/* 2>/dev/null; exit $$status

heard-%:
	$(MAKE) --no-print-directory $* >$(FAILED)/$* 2>&1 && cat $(FAILED)/$* && rm $(FAILED)/$*

# Beside each other, and with many small tensors, a second thread costs a process more than it brings.
test-%: export OMP_NUM_THREADS ?= 1

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Without ComfyUI; beside the libraries that the numbers are checked against.
test-core: $(PEERS)/.ready
	$(PEERS)/bin/pytest tests/core

test-comfy: test-nodes test-browser

# A real ComfyUI, in the tests' process and as a server.
test-nodes: $(VENV)/.ready
	$(VENV)/bin/pytest tests/comfy

# Its page in a real browser.
test-browser: $(VENV)/.ready $(PAGE) chromium
	$(VENV)/bin/pytest tests/browser

# The archive that the registry gets, and a newcomer's first minutes with it.
test-release: $(VENV)/.ready $(PAGE) chromium
	$(VENV)/bin/pytest tests/release

# torch first, then everything else held to that torch. torchvision's compiled operators are not
# needed and do not load beside a CPU build, hence --no-deps; demo/launch.py says more.
$(VENV)/.ready: pyproject.toml constraints.txt $(REQUIREMENTS)
	$(PYTHON) -m venv $(VENV) $(OR_SAY)
	$(VENV)/bin/python $(PIP) torch $(OR_SAY)
	$(VENV)/bin/python $(PIP) --no-deps torchvision $(OR_SAY)
	$(if $(REQUIREMENTS),grep -v torchaudio $(REQUIREMENTS) > $(VENV)/requirements.txt)
	$(VENV)/bin/python $(PIP) -e $(NEEDS) $(OR_SAY)
	touch $@

.cache/front-end-%: | $(VENV)/.ready
	$(VENV)/bin/python $(PIP) --no-deps --target $@ comfyui-frontend-package==$*

# diffusers and transformers import torchvision if it is there, so the peers get an environment without it.
$(PEERS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(PEERS) $(OR_SAY)
	$(PEERS)/bin/python $(PIP) torch $(OR_SAY)
	$(PEERS)/bin/python $(PIP) -e '.[dev,peers]' $(OR_SAY)
	touch $@

chromium:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	{ [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || \
	{ echo "The browser tests need Chromium: install it (Debian: apt-get install chromium) and run make test again." >&2; exit 1; }

clean:
	rm -rf .venv* .cache .pytest_cache .mypy_cache .ruff_cache
