"""A discrete-event simulator that drives the production core over made-up fleets, networks and workloads (docs/simulator.md)."""
