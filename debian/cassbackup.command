#!/usr/bin/python3
"""Start cassbackup from /usr/lib/cassbackup, where its bytecode is kept."""

import sys

sys.path.insert(0, "/usr/lib/cassbackup")

from cassbackup import main

sys.exit(main())
