PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := build/proto-venv

.PHONY: demo test test-full lint proto clean

# The generated code must run on the oldest protobuf and grpcio of our ranges: hence this old, pinned compiler.
proto:
	test -x $(PROTO_VENV)/bin/python || $(PYTHON) -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/pip install -q grpcio-tools==1.73.1 setuptools
	$(PROTO_VENV)/bin/python -m grpc_tools.protoc -Iprotocol --python_out=protocol --grpc_python_out=protocol --pyi_out=protocol petal.proto
	sed -i 's/^import petal_pb2 as/from . import petal_pb2 as/' protocol/petal_pb2_grpc.py
