"""The commands: each file has one configuration and one `run`, which joins the floors below."""
