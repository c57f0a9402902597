"""Benchmarks: the same workloads on FlowMesh, on a hand-written broker loop and on Ray, in turn in one run."""
