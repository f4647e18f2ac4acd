"""Altair charts of tables, and the theme they are drawn in."""
