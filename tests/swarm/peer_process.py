"""A peer in a process of its own: prints its peer id and address as JSON, serves until stdin ends."""

from __future__ import annotations

import asyncio
import json
import sys

from tests.swarm.behaviours import serve_all

from corolla.swarm.transport.libp2p import Libp2pTransport


async def main() -> None:
    transport = await Libp2pTransport.create(initial_peers=sys.argv[1:])
    await serve_all(transport)
    print(json.dumps({"peer_id": transport.peer_id, "addresses": await transport.addresses()}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await transport.close()


asyncio.run(main())
