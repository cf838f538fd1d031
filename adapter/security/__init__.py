"""Secrets and permissions: tokens sealed at rest, and the permissions of each role."""
