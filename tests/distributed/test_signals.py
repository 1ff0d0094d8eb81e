"""Signals are noted while a stage trains and end everything else at once."""

from __future__ import annotations

import signal

import pytest

from lightning_internvl.distributed.signals import RunStopped, Watch


def test_while_a_stage_trains_a_signal_waits_and_a_later_one_does_not(capfd: pytest.CaptureFixture[str]) -> None:
    before, watch = signal.getsignal(signal.SIGTERM), Watch()
    with watch.installed(signal.SIGTERM, signal.SIGINT):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as the trainer puts one of its own
        watch.begin()
        for _ in range(2):  # the second one is the same, told to the process and to its group
            signal.raise_signal(signal.SIGTERM)
        assert watch.received == signal.SIGTERM
        watch.last -= 10.0
        with pytest.raises(RunStopped) as stop:
            signal.raise_signal(signal.SIGINT)
    assert stop.value.code == 130
    assert str(stop.value) == "stopped by Ctrl-C"
    assert capfd.readouterr().err.count("finishes the step and saves") == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_elsewhere_it_ends_at_once() -> None:
    watch = Watch()
    with watch.installed(signal.SIGTERM), pytest.raises(RunStopped) as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 143
    with watch.installed(signal.SIGTERM):
        watch.begin()
        watch.end()
        with pytest.raises(RunStopped):
            signal.raise_signal(signal.SIGTERM)
