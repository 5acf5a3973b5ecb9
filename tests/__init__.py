import importlib
import importlib.util
import sys
import types
from pathlib import Path

if importlib.util.find_spec("petal") is None:  # a machine without a package index: the folders are the package
    petal = types.ModuleType("petal")
    petal.__path__ = [str(Path(__file__).parents[1])]
    sys.modules["petal"] = petal

importlib.import_module("petal.protocol")  # before a test imports gRPC
