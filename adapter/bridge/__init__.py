"""Commands of sandboxes, from the bus to iLink."""
