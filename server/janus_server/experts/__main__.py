"""Start an expert worker: `python -m janus_server.experts`."""

from janus_server.experts.config import ExpertConfig
from janus_server.experts.worker import main
from janus_server.process import run

if __name__ == "__main__":
    run("experts", ExpertConfig, main)
