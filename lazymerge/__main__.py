"""`python -m lazymerge` is the `lazymerge` command."""

from .cli.main import command

if __name__ == "__main__":
    command()
