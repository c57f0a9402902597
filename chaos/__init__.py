"""Chaos: a mesh of real processes under work and faults, and a checker of everything that was seen of it (docs/fault-report.md)."""
