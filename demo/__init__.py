"""The demo: two tenants, three nodes, a real model, one node killed on the way. Run it with ``python -m demo``."""
