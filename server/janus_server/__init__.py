"""Serve Mixture-of-Experts models with attention and experts in separate pools of workers."""

import os

# Read when gRPC is imported. Its core would write lines of its own to standard error, hundreds for
# each small call of a client whose headers it cannot read. What it fails at is raised as well.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

# gRPC ends the process with a way to wait that it does not know, or that is "none".
os.environ["GRPC_POLL_STRATEGY"] = "all"

# Read when torch is imported. Its C++ code would warn of hosts whose name it cannot look up.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
