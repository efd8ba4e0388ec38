"""Python's side of the contract: generated stubs and the gRPC plumbing that all three processes share."""

import os

__version__ = "0.1.0"

# gRPC's own lines, one for each connection that a server ends, would land amid JSON lines and live displays.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
