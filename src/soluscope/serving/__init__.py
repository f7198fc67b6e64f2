"""Pages that only this machine's browser may open: the guard before a page, its server, and its requests."""
