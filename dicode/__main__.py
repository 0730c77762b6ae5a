"""`python -m dicode` is `dicode`."""

from dicode.cli.app import console

if __name__ == "__main__":
    console()
