import petal.protocol  # noqa: F401 (before a test imports gRPC)
