"""``python -m hybridpar``: what torchrun starts."""

from hybridpar.cli import main

if __name__ == "__main__":
    main()
