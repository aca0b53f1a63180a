"""Tests of the client: against a fake worker in this process, over real sockets."""
