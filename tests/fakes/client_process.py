"""Clients in a process of their own, which a test can stop: `python -m ... ADDRESS NUM_CALLS`.

Prints a line when every call has its first message, and then reads on.
"""

import asyncio
import sys

import grpc.aio

from janus_proto.v1.inference_pb2_grpc import InferenceServiceStub
from tests.fakes.endpoint import request


async def main(address: str, num_calls: int) -> None:
    # Without the probe, what is not read fills a stream after 64 KiB.
    options = [("grpc.http2.bdp_probe", 0)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub = InferenceServiceStub(channel)
        calls = [stub.Generate(request(ignore_eos=True)) for _ in range(num_calls)]
        for call in calls:
            await call.read()
        sys.stdout.write("reading\n")
        sys.stdout.flush()
        await asyncio.gather(*(call.code() for call in calls))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
