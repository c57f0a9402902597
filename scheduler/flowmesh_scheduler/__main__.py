"""``python -m flowmesh_scheduler --dir DIR``: one scheduler process."""

from flowmesh_scheduler.process import main

if __name__ == "__main__":
    main()
