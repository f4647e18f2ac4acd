"""Forward passes with reads and edits, sweeps of them, and what is measured of their logits."""
