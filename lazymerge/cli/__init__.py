"""What the user types: one file per command; no logic beyond words and tables.

Commands import what they need when they run, so that `lazymerge --help` answers at once.
"""
