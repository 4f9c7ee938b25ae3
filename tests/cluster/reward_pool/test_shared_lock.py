"""SharedLock: readers together, a writer alone and before those who come later, and nothing lost to cancellation."""

from __future__ import annotations

import asyncio

from cluster.reward_pool.calls import SharedLock


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def shared(lock: SharedLock, log: list[str], name: str, until: asyncio.Event) -> None:
    async with lock.shared():
        log.append(name)
        await until.wait()


async def alone(lock: SharedLock, log: list[str], until: asyncio.Event) -> None:
    async with lock.alone():
        log.append("alone")
        await until.wait()


def test_a_writer_waits_for_readers_and_goes_before_later_ones() -> None:
    async def run() -> None:
        lock, log, done, written = SharedLock(), list[str](), asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(shared(lock, log, name, done)) for name in ("a", "b")]
        await settle()
        tasks.append(asyncio.create_task(alone(lock, log, written)))
        await settle()
        tasks.append(asyncio.create_task(shared(lock, log, "late", done)))
        await settle()
        assert log == ["a", "b"]
        done.set()
        await settle()
        assert log == ["a", "b", "alone"]
        written.set()
        await asyncio.gather(*tasks)
        assert log == ["a", "b", "alone", "late"]

    asyncio.run(run())


def test_a_writer_that_gives_up_lets_readers_in() -> None:
    async def run() -> None:
        lock, log, done = SharedLock(), list[str](), asyncio.Event()
        reader = asyncio.create_task(shared(lock, log, "a", done))
        await settle()
        writer = asyncio.create_task(alone(lock, log, done))
        await settle()
        late = asyncio.create_task(shared(lock, log, "late", done))
        await settle()
        writer.cancel()
        await settle()
        assert log == ["a", "late"]
        done.set()
        await asyncio.gather(reader, late)
        async with asyncio.timeout(120), lock.alone():
            pass

    asyncio.run(run())
