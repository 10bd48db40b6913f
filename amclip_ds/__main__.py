"""`python -m amclip_ds` is the same program as `amclip`."""

import sys

from amclip_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
