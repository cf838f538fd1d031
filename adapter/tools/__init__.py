"""What all rooms use: time, tasks, shares, decoding, sealing, logs, metrics, events. Nothing here knows a room."""
