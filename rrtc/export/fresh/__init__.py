"""Programs that load an export as somebody without rrtc does. They run in a process of their own."""
