"""`python -m pipeline.cli`, as torchrun and `accelerate launch` start it."""

import sys

from pipeline.cli.main import main

sys.exit(main())
