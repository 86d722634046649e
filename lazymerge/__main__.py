"""`python -m lazymerge` is the `lazymerge` command."""

from .cli.main import main

if __name__ == "__main__":
    main()
