"""Self-contained HTML pages: the plan, and the report of a finished merge."""
