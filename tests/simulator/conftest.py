from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import httpx
import msgspec
import pytest

from adapter.simulator import Simulator, SimulatorSettings
from tests.simulator.client import FAST, LONG, Client

MakeClient = Callable[..., Awaitable[Client]]


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as client:
        yield client


@pytest.fixture
async def make(http: httpx.AsyncClient) -> AsyncIterator[MakeClient]:
    """`await make(quota=3)`: a simulator with short holds of its own, and a client of its one bot."""
    async with AsyncExitStack() as stack:

        async def start(base: SimulatorSettings = FAST, **changes: object) -> Client:
            settings = msgspec.structs.replace(base, **changes)
            sim = await stack.enter_async_context(Simulator(settings))
            return Client(sim, sim.add_bot(), http)

        yield start


@pytest.fixture
async def client(make: MakeClient) -> Client:
    return await make()


@pytest.fixture
async def patient(make: MakeClient) -> Client:
    """A client whose polls are parked until something happens."""
    return await make(LONG)
