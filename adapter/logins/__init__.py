"""QR logins over the bus."""
