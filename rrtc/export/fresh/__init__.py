"""Programs that load an export as somebody without rrtc does, each in a process of its own; importing does nothing."""
