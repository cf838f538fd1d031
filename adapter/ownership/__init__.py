"""Which replicas live, and what each of them owns."""
