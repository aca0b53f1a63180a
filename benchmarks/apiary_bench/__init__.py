"""Benchmarks of Apiary: what `apiary bench` runs."""
