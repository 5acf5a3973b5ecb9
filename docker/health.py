"""Exit 0 where a peer or an admin serves on this container's PETAL_PORT: where it completes a TLS 1.3 handshake."""

import os
import socket
import ssl

context = ssl.create_default_context()
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is asked for life, not believed in anything
context.minimum_version = ssl.TLSVersion.TLSv1_3
context.set_alpn_protocols(["h2"])
host = os.environ.get("PETAL_HOST") or socket.gethostname()
with socket.create_connection((host, int(os.environ.get("PETAL_PORT", "31330"))), timeout=4) as connection:
    context.wrap_socket(connection).close()
