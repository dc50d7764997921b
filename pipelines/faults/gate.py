"""A door before the object store that can be shut: connections are refused, or taken and never answered."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, Literal

How = Literal["refuses", "hangs"]


class Gate:
    """Listens on a port of 127.0.0.1 of the kernel's choice and passes on to `host:port`."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gate", daemon=True)
        self._thread.start()
        self._writers: set[asyncio.StreamWriter] = set()
        self._flowing = self._call(self._event())
        self._server = self._call(asyncio.start_server(self._pass_on, "127.0.0.1", 0))
        self.port = int(self._server.sockets[0].getsockname()[1])

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    @staticmethod
    async def _event() -> asyncio.Event:
        event = asyncio.Event()
        event.set()
        return event

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._flowing.wait()
            there_reader, there_writer = await asyncio.open_connection(*self._target)
            self._writers.add(there_writer)
            await asyncio.gather(self._pump(reader, there_writer), self._pump(there_reader, writer))
        except OSError:
            pass  # one side is gone: the other is closed below
        finally:
            writer.close()
            self._writers.discard(writer)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                await self._flowing.wait()
                sink.write(data)
                await sink.drain()
        finally:
            sink.close()
            self._writers.discard(sink)

    def shut(self, how: How) -> None:
        """From now on nothing gets through."""
        self._call(self._shut(how))

    async def _shut(self, how: How) -> None:
        if how == "hangs":
            self._flowing.clear()
            return
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()

    def open(self) -> None:
        """All gets through again."""
        self._call(self._open())

    async def _open(self) -> None:
        self._flowing.set()
        if not self._server.is_serving():
            self._server = await asyncio.start_server(self._pass_on, "127.0.0.1", self.port)

    def close(self) -> None:
        self.shut("refuses")
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
