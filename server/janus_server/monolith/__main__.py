"""Start a monolithic worker: `python -m janus_server.monolith`."""

from janus_server.monolith.config import MonolithConfig
from janus_server.monolith.worker import main
from janus_server.process import run

if __name__ == "__main__":
    run("monolith", MonolithConfig, main)
