"""``python -m factscope``."""

from factscope.cli import main

if __name__ == "__main__":
    main()
