"""The sole place where protobuf and domain types meet: `incoming` requests, `outgoing` responses."""
