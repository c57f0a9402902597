"""Starts things: the embedded mesh, its broker and its credentials."""
