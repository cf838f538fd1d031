"""The edge towards NATS: connections, publishing, buckets, consumers. Holds no rule about messages."""
