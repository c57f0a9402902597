"""Decides: the pure scheduling core and the service that runs it."""
