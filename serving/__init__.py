"""What keeps the server up: pictures decoded in processes of their own, a watchdog, a supervisor; and batches."""
