"""What keeps the server up: pictures decoded in a process of their own, a watchdog, and requests gathered in batches."""
