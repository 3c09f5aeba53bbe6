"""Sharing one operation among threads: a board in memory, helpers that wait at it, jobs by address.

A job is a kernel (board, chunk, thread) that reads its arguments from the board and computes one chunk.
Whoever runs it posts the number of chunks and takes chunks itself; helpers join as they wake, so a slow
one delays nobody by more than its chunk. Which thread computes a chunk never shows in the result.

    board (int64)   TURN    counts jobs; helpers sleep on it (futex)
                    TICKET  turn << 32 | chunks << 16 | next chunk: one fetch_add both claims a chunk
                            and tells of which job, so that a late helper takes none of another
                    DONE    finished chunks; whoever runs the job sleeps on it
                    JOB     its address; MAY_HELP: threads below this number may take part
                    THREADS, STREAMING: how many threads, and how many of them when weights stream;
                    LEAST_WORK: fewer multiply-adds than these are not shared
                    ...     then the job's own arguments, from ARGUMENTS on

Not in here: starting the threads (scheduler/decoder/crew.py) and the jobs themselves.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from numba import types
from numba.extending import intrinsic

from .atomics import fetch_add, futex_wait, futex_wake, load, pause, store
from .calls import address_of, emit_call
from .kernel import kernel

# Each of the first words has a cache line of its own.
TURN, TICKET, DONE = 0, 8, 16
JOB, SLEEPERS, WAITING, STOP, THREADS, STREAMING, MAY_HELP, LEAST_WORK = 24, 25, 26, 27, 28, 29, 30, 31
ARGUMENTS = 32
BOARD_WORDS = 64
MAX_CHUNKS = 1 << 14

_BOARD = types.Array(types.int64, 1, "C")
_JOB_ARGUMENTS = (_BOARD, types.int64, types.int64)
_SPINS = 400  # some 10 us: less than a futex takes to sleep and wake
_SLICE_NS = 500_000_000


@cache
def job_address(job: Any) -> int:
    """Return the address of the kernel `job`, (board, chunk, thread), compiled now or loaded."""
    return address_of(job, _JOB_ARGUMENTS)


@intrinsic
def _call(typing, address, board, chunk, thread):
    def emit(context, builder, signature, args):
        return emit_call(context, builder, args[0], _JOB_ARGUMENTS, args[1:])

    return types.void(types.int64, *_JOB_ARGUMENTS), emit


@kernel
def threads_for(board, work, tokens):
    """Return how many threads to use: one token streams weights, many compute."""
    if work < board[LEAST_WORK]:
        return 1
    return board[STREAMING] if tokens == 1 else board[THREADS]


@kernel
def _work(board, thread):
    """Compute chunks of whatever job there is until none is left."""
    while True:
        ticket = fetch_add(board, TICKET, 1)
        chunk, chunks = ticket & 0xFFFF, (ticket >> 16) & 0xFFFF
        if chunk >= chunks:
            return
        # Claimed: this job's arguments stay until its last chunk is done.
        _call(board[JOB], board, chunk, thread)
        if fetch_add(board, DONE, 1) + 1 == chunks and load(board, WAITING):
            futex_wake(board, DONE, 1)


@kernel
def run(board, job, chunks, threads):
    """Compute `chunks` (below MAX_CHUNKS) chunks of `job`, whose arguments lie on the board, and wait.

    job: from job_address; threads: how many may take part, this one included. Only one thread may run
    jobs.
    """
    if threads < 2:
        for chunk in range(chunks):
            _call(job, board, chunk, 0)
        return
    board[JOB], board[MAY_HELP] = job, threads
    store(board, DONE, 0)
    turn = load(board, TURN) + 1
    store(board, TICKET, ((turn & 0x7FFFFFFF) << 32) | (chunks << 16))
    store(board, TURN, turn)
    if load(board, SLEEPERS):
        futex_wake(board, TURN, board[THREADS])
    _work(board, 0)
    spins = 0
    while load(board, DONE) < chunks:
        spins += 1
        if spins < _SPINS:
            pause()
            continue
        store(board, WAITING, 1)
        done = load(board, DONE)
        if done < chunks:
            futex_wait(board, DONE, done, _SLICE_NS)
        store(board, WAITING, 0)


@kernel
def help_out(board, thread):
    """Join the jobs of `board` as helper `thread` (from 1 on) until STOP is set."""
    seen = load(board, TURN)
    while not load(board, STOP):
        turn = load(board, TURN)
        if turn != seen:
            seen = turn
            if thread < board[MAY_HELP]:
                _work(board, thread)
            continue
        spins = 0
        while spins < _SPINS and load(board, TURN) == seen:
            pause()
            spins += 1
        if load(board, TURN) == seen and not load(board, STOP):
            fetch_add(board, SLEEPERS, 1)
            futex_wait(board, TURN, seen, _SLICE_NS)
            fetch_add(board, SLEEPERS, -1)


@kernel
def stop(board):
    """Have all helpers leave."""
    store(board, STOP, 1)
    fetch_add(board, TURN, 1)
    futex_wake(board, TURN, board[THREADS])
