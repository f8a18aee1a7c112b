"""The free memory of GPUs. `python -m janus_server.model.gpu` prints that of each, as JSON.

To ask a GPU takes hundreds of MiB of it for as long as the process lives, hence a process.
"""

import json
import sys

import torch

from janus_server.model.memory import ADDRESS_SPACE, free_address_space, free_memory


def free_device_memory(device: torch.device) -> tuple[int, str]:
    """Bytes that this process can take of the memory of `device`, and whose they are."""
    if device.type == "cpu":
        return min((free_memory(), "this machine"), (free_address_space(), ADDRESS_SPACE))
    free, _ = torch.cuda.mem_get_info(device)
    return free, f"GPU {device.index}"


if __name__ == "__main__":
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    json.dump([free_device_memory(gpu)[0] for gpu in gpus], sys.stdout)
