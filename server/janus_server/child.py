"""`python -m janus_server.child MODULE ARGUMENTS`: run a module as a child of `janus serve`.

Python answers SIGINT with a traceback while it imports. A child ends without a word, as it does on
SIGTERM, until it leaves both to its parent (`lifeline.py`).
"""

import runpy
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
