"""The bridge between WeChat (iLink) and NATS JetStream."""
