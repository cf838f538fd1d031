"""What a replica says of its work: metrics, logs, and events for sandboxes and platforms."""
