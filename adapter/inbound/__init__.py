"""Messages of users, from iLink to the inboxes of sandboxes."""
