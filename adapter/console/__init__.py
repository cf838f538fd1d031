"""A page for operators: bindings, dead letters and logins, served by any replica for the whole platform."""
