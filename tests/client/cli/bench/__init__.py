"""Tests of `apiary bench`."""
