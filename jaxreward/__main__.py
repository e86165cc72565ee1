"""`python -m jaxreward` is the same as the `jaxreward` command."""

from jaxreward.cli import entry

if __name__ == "__main__":
    entry()
