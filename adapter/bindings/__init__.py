"""Which bot serves which sandbox."""
