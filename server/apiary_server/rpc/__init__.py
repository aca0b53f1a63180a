"""The gRPC side of the worker: bytes in, domain calls out, one status table back."""
