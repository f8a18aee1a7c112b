"""The free memory of GPUs. `python -m janus_server.model.gpu` prints that of each, as JSON.

To ask a GPU takes hundreds of MiB of it for as long as the process lives, hence a process.
"""

import json
import sys

import torch

from janus_server.model.memory import free_memory


def free_device_memory(device: torch.device) -> int:
    """Bytes that this process can still take of the memory in which `device` computes."""
    if device.type == "cpu":
        return free_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def memory_name(device: torch.device) -> str:
    """The memory in which `device` computes, for messages."""
    return "this machine" if device.type == "cpu" else f"GPU {device.index}"


if __name__ == "__main__":
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    json.dump([free_device_memory(gpu) for gpu in gpus], sys.stdout)
