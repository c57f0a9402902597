"""Chaos: a mesh of real processes under work and faults, and a checker of all that was seen (docs/fault-report.md)."""
