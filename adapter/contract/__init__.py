"""What lies on the bus: messages that others read and write, subjects and headers, and records of our own."""
