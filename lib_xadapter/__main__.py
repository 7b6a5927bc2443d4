"""`python -m lib_xadapter`."""

from .headless.cli import program

if __name__ == "__main__":
    program()
