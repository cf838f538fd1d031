"""The bridge between WeChat (iLink) and NATS JetStream."""

__version__ = "0.1.0"
