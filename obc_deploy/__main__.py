"""`python -m obc_deploy` is `obc-deploy`."""

from __future__ import annotations

import sys

from obc_deploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
