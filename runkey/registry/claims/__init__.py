"""A key is trained once: claims, their owners, and what to do about a key."""
