"""Mamba-1: its record, the pass through one of its layers, and the layout of mamba_ssm's checkpoints."""
