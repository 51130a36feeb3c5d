"""`python -m gradreg`, which is how torchrun starts the command: `torchrun --nproc-per-node 2 -m gradreg train`."""

import sys

if __name__ == "__main__":
    try:
        from gradreg.cli import main
    except KeyboardInterrupt:
        print("gradreg: interrupted; nothing was started.", file=sys.stderr)
        sys.exit(130)
    sys.exit(main())
