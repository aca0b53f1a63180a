"""Tests of the `apiary` command."""
