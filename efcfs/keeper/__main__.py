"""What `python -S -E efcfs/keeper FD` runs: finds the package after the standard library, so that it hides nothing."""

import sys

sys.path[:1] = []
sys.path.append(__file__.rpartition("/efcfs/")[0])

from efcfs.keeper.start import main  # noqa: E402

sys.exit(main())
