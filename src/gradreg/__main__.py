"""`python -m gradreg`, which is how torchrun starts the command: `torchrun --nproc-per-node 2 -m gradreg train`."""

import sys

from gradreg.cli import main

if __name__ == "__main__":
    sys.exit(main())
