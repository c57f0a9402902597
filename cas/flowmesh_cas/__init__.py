"""Content-addressed storage: CIDs, UnixFS, blocks on disk, manifests, pins. Knows no network and no clock."""
