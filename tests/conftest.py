"""Fixtures that several suites share."""

from tests.fixtures_broker import broker, broker_process, mesh_broker

__all__ = ["broker", "broker_process", "mesh_broker"]
