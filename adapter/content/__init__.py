"""What a message is, independent of its source: identity, quotes and media."""
