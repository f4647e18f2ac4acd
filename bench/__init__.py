"""Costs as multiples of plain forwards of the stock model: `python -m bench.ratios`, `.scaling`, `.peers`."""
