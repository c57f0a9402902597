"""The pure core: ``step(state, event, now) -> commands``. No clock, socket, disk or thread inside."""
