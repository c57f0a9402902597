"""The operator library: what runs inside executor processes."""
