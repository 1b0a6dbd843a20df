"""A coroutine beside the thread that waits for it: what is thrown into that thread ends it, however busy its loop is."""

import asyncio
import contextvars
import ctypes
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.beside import run_beside

ROOT = Path(__file__).resolve().parents[2]
WHERE = contextvars.ContextVar("WHERE", default="nowhere")


class Thrown(BaseException):
    """What Prefect throws is no Exception either."""


async def busy(done: list[str]) -> None:
    """Callbacks without a pause, and what is to be written at the end."""
    loop, turning = asyncio.get_running_loop(), True

    def turn() -> None:
        if turning:
            loop.call_soon(turn)

    turn()
    try:
        await asyncio.Event().wait()
    finally:
        turning = False
        await asyncio.sleep(0.01)
        done.append("written")


def test_it_returns_and_raises_what_the_coroutine_does() -> None:
    async def where() -> str:
        await asyncio.sleep(0)
        return WHERE.get()

    async def fails() -> None:
        raise TimeoutError("too late")

    WHERE.set("here")
    assert run_beside(where()) == "here"
    with pytest.raises(TimeoutError, match="too late"):
        run_beside(fails())


def test_what_is_thrown_into_the_waiting_thread_ends_the_coroutine_first() -> None:
    done: list[str] = []
    waiting = threading.get_ident()

    def throw() -> None:
        time.sleep(0.3)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_long(waiting), ctypes.py_object(Thrown))

    thrower = threading.Thread(target=throw)
    thrower.start()
    with pytest.raises(Thrown):
        run_beside(busy(done))
    thrower.join()
    assert done == ["written"]


def test_a_signal_ends_it_too() -> None:
    """In a process of its own, whose main thread raises as Prefect's handler of SIGTERM does."""
    program = f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
from tasks.beside import run_beside
from tests.tasks.test_beside import Thrown, busy
async def begun(done):
    print("begun", flush=True)
    await busy(done)
def ended(*_):
    raise Thrown
signal.signal(signal.SIGTERM, ended)
done = []
try:
    run_beside(begun(done))
except Thrown:
    print(done)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.5)  # it began beside the thread that the signal reaches
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert said == "['written']\n"
