"""What every process of the mesh shares: words, wire messages, the bus, the client, the command line."""

__version__ = "0.1.0"
