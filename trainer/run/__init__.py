"""The run: the loop over gRPC and everything that it drives."""
