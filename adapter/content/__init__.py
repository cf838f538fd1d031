"""What a message is, wherever it comes from: what tells it from others, what it quotes, what its media are."""
