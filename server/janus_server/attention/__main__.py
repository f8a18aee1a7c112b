"""Start an attention worker: `python -m janus_server.attention`."""

from janus_server.attention.config import AttentionConfig
from janus_server.attention.worker import main
from janus_server.process import run

if __name__ == "__main__":
    run("attention", AttentionConfig, main)
