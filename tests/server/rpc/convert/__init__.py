"""Tests of the conversions between protobuf and the domain."""
