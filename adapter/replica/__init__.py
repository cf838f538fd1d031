"""One running replica: its parts put together, what runs when, and what it says of its health. `wiring` lists all."""
