"""Train, validate or test any algorithm on any task distribution: ``python train.py --config configs/….yaml``."""

from app.cli.builder import main

if __name__ == "__main__":
    main()
