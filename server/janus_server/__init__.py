"""Serve Mixture-of-Experts models with attention and experts in separate pools of workers."""

import os

# Read when gRPC is imported. Its core would write lines of its own to standard error, hundreds for
# each small call of a client whose headers it cannot read. What it fails at is raised as well.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
