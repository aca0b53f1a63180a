"""Tests of the gRPC side: the real server on a real socket, before a fake engine."""
