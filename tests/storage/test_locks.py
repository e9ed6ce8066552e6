"""Whoever waits for another process is told why, once, and goes on when that is over."""

import logging
import threading

from filelock import FileLock

from gaintune.storage import locked


def test_a_long_wait_is_told_of_once(tmp_path, caplog):
    held, found = FileLock(tmp_path / "a.lock", thread_local=False), []

    def wait():
        with locked(tmp_path / "a.lock", "measuring the base on law", patience=0.1):
            found.append("mine")

    with caplog.at_level(logging.WARNING):
        held.acquire()
        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.6)
        assert found == []
        held.release()
        waiting.join(10)
        assert found == ["mine"]
        told = [record.getMessage() for record in caplog.records if record.name == "gaintune.storage.run"]
        assert len(told) == 1 and "another process is measuring the base on law" in told[0]
        with locked(tmp_path / "a.lock", "measuring", patience=0.1):
            pass
    assert len([record for record in caplog.records if record.name == "gaintune.storage.run"]) == 1
