"""Every experiment of both papers as data, and what runs them."""
