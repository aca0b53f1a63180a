"""Sessions and snapshots in a Valkey server, which several workers can reach."""
