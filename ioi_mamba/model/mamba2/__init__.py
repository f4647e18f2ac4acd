"""Mixers of the second kind: Mamba-2, and the hybrids that are made of it."""
