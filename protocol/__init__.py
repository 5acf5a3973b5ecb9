import os

# Servers shall refuse TLS 1.2, which grpcio accepts and has no option against: with our P-256 certificates these suites
# suit no handshake of 1.2, and those of 1.3 are not affected. gRPC reads the variable once, when it is imported.
os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-RSA-AES128-GCM-SHA256")
# What gRPC writes to standard error about failed handshakes, Petal says in sentences, to whom it concerns.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
