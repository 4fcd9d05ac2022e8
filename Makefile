# The repository's commands. `make demo` and `make test` need Python 3.10+, make and a package index, nothing else: they make
# .venv unless a virtual environment is active, install and build into it, and run. PYTHON=python3.12 chooses the interpreter.
#
#   make demo      train on real images, check the fused kernels against the plain formula, time both
#   make test      ruff and the test suite, a worker for each core
#   make bench     the benchmarks' tables
#   make install   install and build again, whatever the stamp says
#   make lint      ruff alone
#   make clean     remove what was built; .venv and runs/ stay

PYTHON ?= python3
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# One environment for every command, so that the extension is built once. The stamp says that this checkout is installed
# there; it is older than a changed source, and then the extension is built again.
STAMP := $(VENV)/.mpvg-$(shell pwd | cksum | cut -d ' ' -f 1)
SOURCES := pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test bench install lint clean
.DELETE_ON_ERROR:

demo: $(STAMP)
	$(PY) -m mpvg_kernels demo

test: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m pytest -n auto --dist loadgroup

bench: $(STAMP)
	$(PY) -m mpvg_kernels bench dual_ln
	$(PY) -m mpvg_kernels bench norm_pool
	$(PY) -m mpvg_kernels bench train

lint: $(STAMP)
	$(PY) -m ruff check .

install:
	@rm -f $(STAMP)
	@$(MAKE) $(STAMP)

# setup.py needs torch to build against, so torch and the build tools come first and the build is not isolated from them.
$(STAMP): $(SOURCES) | $(PY)
	$(PIP) install "setuptools>=77" wheel ninja numpy torch torchvision
	@command -v $${CXX:-c++} >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	    echo "No C++ compiler found: going on without the compiled kernels, on the reference backend."
	$(PIP) install --no-build-isolation -e ".[bench,dev]"
	@touch $@

$(PY):
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	    { echo "Python 3.10 or newer is needed, for example: make PYTHON=python3.12 demo" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) can't make a virtual environment" \
	    "(on Debian and Ubuntu: apt install python3-venv); or activate one of your own" >&2; exit 1; }

clean:
	rm -rf build dist *.egg-info mpvg_kernels/*.so .pytest_cache .ruff_cache .hypothesis .benchmarks $(STAMP)
	find mpvg_kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
