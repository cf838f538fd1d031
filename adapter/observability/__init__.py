"""What a replica reports about its work: metrics, logs, and events for sandboxes and platforms."""
