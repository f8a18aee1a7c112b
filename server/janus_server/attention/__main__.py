"""Start an attention worker: `python -m janus_server.attention`."""

import sys

from janus_server.attention.config import AttentionConfig
from janus_server.attention.worker import main
from janus_server.process import run

if __name__ == "__main__":
    sys.exit(run("attention", AttentionConfig, main))
