"""The data on the bus: public messages, subjects and headers, and the adapter's own records."""
