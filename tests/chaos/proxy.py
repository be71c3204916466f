"""A TCP proxy in front of the object store that delays traffic or breaks connections."""

import asyncio
import contextlib
import threading

LOOPBACK = "127.0.0.1"


class Proxy:
    """Forwards connections to a port at the same address; it can delay them or break them midway."""

    def __init__(self, target: int, address: str = LOOPBACK) -> None:
        self.delay_seconds = 0.0
        """Delay of every chunk, in both directions."""
        self._target = target
        self._address = address
        self._loop = asyncio.new_event_loop()
        self._ends: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        self.port: int = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Break every open connection, even in mid-transfer."""
        asyncio.run_coroutine_threadsafe(self._abort(), self._loop).result(10)

    def close(self) -> None:
        """Break the open connections and stop the proxy."""
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, self._address, 0)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._ends.add(writer)
        there = None
        try:
            from_there, there = await asyncio.open_connection(self._address, self._target)
            self._ends.add(there)
            await asyncio.gather(self._pass(reader, there), self._pass(from_there, writer))
        except (OSError, asyncio.CancelledError):
            pass  # the target is away or one side disconnected: the other side sees its connection close
        finally:
            for end in filter(None, (writer, there)):
                end.transport.abort()
                self._ends.discard(end)
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            if self.delay_seconds:
                await asyncio.sleep(self.delay_seconds)
            writer.write(data)
            await writer.drain()
        # Closes both directions, not just this one: S3 clients send whole requests and never half-close.
        with contextlib.suppress(OSError):
            writer.close()

    async def _abort(self) -> None:
        for end in list(self._ends):
            end.transport.abort()

    async def _shut(self) -> None:
        self._server.close()
        await self._abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
