"""Runs: the node agent, its executors and the operator library."""
