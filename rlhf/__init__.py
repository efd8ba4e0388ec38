"""Python's side of the contract: generated stubs and the gRPC plumbing that all three processes share."""

__version__ = "0.1.0"
