"""The bare engine, without gRPC: `apiary bench engine`."""
