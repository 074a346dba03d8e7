# SPDX-License-Identifier: Apache-2.0
"""Signals, in a forked process: what the first one does, what the second, and what is left alone."""

import hashlib
import os
import signal
import time

import pytest

import cogview.training.interrupt
from cogview.training.interrupt import DeferredInterrupt, Interrupted
from tests.model.helpers import heed_signals


def in_a_child(body):
    """Runs ``body(say)`` in a forked process; its process id, and the pipe from which ``say`` is read."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, os.fdopen(reader)
    code = 99
    try:
        os.dup2(writer, 2)
        heed_signals()
        code = body(lambda word: os.write(writer, f"{word}\n".encode())) or 0
    finally:
        os._exit(code)


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def steps_until_asked(say):
    """As the loop does: looks whether it is to stop only after a step."""
    try:
        with DeferredInterrupt() as interrupt:
            say("ready")
            while not interrupt.requested:
                time.sleep(0.01)
            say("step finished")
            raise interrupt.exception()
    except KeyboardInterrupt as ended:
        return ended.signum


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_answered_at_once_and_the_step_is_finished(signum):
    child, lines = in_a_child(steps_until_asked)
    assert lines.readline() == "ready\n"
    os.kill(child, signum)
    said = lines.read()
    assert "finishing this step, then saving; a second Ctrl-C ends at once" in said
    assert "step finished" in said
    assert exit_code(child) == signum


def never_asks(say):
    try:
        with DeferredInterrupt():
            say("ready")
            while True:
                time.sleep(0.01)
    except Interrupted as ended:
        return ended.signum


def is_inside_a_long_operation(say):
    with DeferredInterrupt():
        say("ready")
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, in which Python handles no signal
    return 0


def test_a_second_signal_ends_the_step():
    child, lines = in_a_child(never_asks)
    assert lines.readline() == "ready\n"
    os.kill(child, signal.SIGINT)
    assert lines.readline() == "\n" and lines.readline().startswith("finishing this step")
    os.kill(child, signal.SIGTERM)
    assert exit_code(child) == signal.SIGTERM


def test_inside_a_long_operation_the_first_signal_is_answered_and_the_second_one_ends_it(monkeypatch):
    monkeypatch.setattr(cogview.training.interrupt, "GRACE_SECONDS", 0.1)
    child, lines = in_a_child(is_inside_a_long_operation)
    assert lines.readline() == "ready\n"
    os.kill(child, signal.SIGINT)
    assert lines.readline() == "\n" and lines.readline().startswith("finishing this step")
    os.kill(child, signal.SIGINT)
    assert "ended at once; what is saved is whole" in lines.read()
    assert exit_code(child) == 130


def test_an_ignored_signal_stays_ignored_and_handlers_are_put_back():
    def body(say):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        before = signal.getsignal(signal.SIGINT)
        with DeferredInterrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            ignored = not interrupt.requested
        return 0 if ignored and signal.getsignal(signal.SIGINT) is before else 1

    child, lines = in_a_child(body)
    assert lines.read() == ""
    assert exit_code(child) == 0


def test_a_process_that_reads_ahead_does_not_answer_in_the_name_of_the_training():
    def body(say):
        reader, writer = os.pipe()
        with DeferredInterrupt() as interrupt:
            child = os.fork()
            if not child:
                os.write(writer, b"x")
                time.sleep(30)
                os._exit(0)
            os.read(reader, 1)
            os.kill(child, signal.SIGTERM)
            died = exit_code(child)
            time.sleep(0.1)
            return 0 if died == -signal.SIGTERM and not interrupt.requested else 1

    child, lines = in_a_child(body)
    assert lines.read() == ""
    assert exit_code(child) == 0


def test_a_closed_terminal_does_not_keep_a_training_from_saving():
    def body(say):
        with DeferredInterrupt() as interrupt:
            main, end = os.openpty()
            os.dup2(end, 1), os.dup2(end, 2)
            os.close(end), os.close(main)
            os.kill(os.getpid(), signal.SIGHUP)
            while not interrupt.requested:
                time.sleep(0.01)
            time.sleep(0.2)
        os.write(1, b"a word that nobody hears")
        return 0

    child, _ = in_a_child(body)
    assert exit_code(child) == 0
