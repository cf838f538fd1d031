"""What keeps secrets and subjects apart: tokens sealed where they are stored, and the permissions of each role."""
