"""A slow network between two programs of one machine: what one sends comes later to the other, in
order, and now and then, as when a packet was lost and is sent again, much later.

    python relay.py LISTEN_PORT TARGET_PORT SEED
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from random import Random

DELAY_SECONDS = (0.02, 0.08)

LOSS = 0.02
"""Share of the pieces that are sent again."""

AGAIN_SECONDS = (0.2, 1.0)
"""What that takes: TCP waits 0.2 s at first, and twice as long every other time."""

PIECE_BYTES = 64 << 10


async def _carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter, random: Random) -> None:
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(256)

    async def deliver() -> None:
        while True:
            at, data = await pieces.get()
            await asyncio.sleep(max(0.0, at - loop.time()))
            if not data:
                sink.close()
                return
            sink.write(data)
            await sink.drain()

    delivery = asyncio.create_task(deliver())
    with suppress(OSError):
        while not delivery.done():
            data = await source.read(PIECE_BYTES)
            seconds = random.uniform(*DELAY_SECONDS)
            if random.random() < LOSS:
                seconds += random.uniform(*AGAIN_SECONDS)
            await pieces.put((loop.time() + seconds, data))
            if not data:
                break
    with suppress(OSError):
        await delivery


async def relay(listen_port: int, target_port: int, seed: int) -> None:
    """Relays connections for ever."""
    random = Random(seed)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", target_port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(_carry(reader, back, random), _carry(there, writer, random))

    server = await asyncio.start_server(connected, "127.0.0.1", listen_port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(relay(*map(int, sys.argv[1:])))
