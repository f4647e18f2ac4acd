"""Experiments run on a model: planned, carried out, recorded."""
