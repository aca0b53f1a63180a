"""The Apiary worker: sessions with bounded caches, batched continuously, behind gRPC."""
