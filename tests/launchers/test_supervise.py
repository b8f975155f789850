"""The supervisor: what it starts again, what not, how long it waits, and whom it passes signals on to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megatronish.errors import ConfigError
from megatronish.training.supervision import Supervisor, run_folder
from tests.launch.faulty_ranks import LIMIT_SECONDS

ROOT = Path(__file__).parents[2]


def script(folder: Path, body: str) -> list[str]:
    """A command that runs `body`, in which `turn` is the number of earlier attempts and `save(name)` makes a checkpoint."""
    text = f"""
        import os, pathlib, signal, sys, time
        run = pathlib.Path({str(folder / "run")!r})
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        counter = run / "turns"
        turn = int(counter.read_text()) if counter.exists() else 0
        counter.write_text(str(turn + 1))

        def save(name):
            (run / "checkpoints" / "latest").write_text(name + "\\n")

        """
    path = folder / "command.py"
    path.write_text(textwrap.dedent(text) + textwrap.dedent(body))
    return [sys.executable, str(path)]


def attempts(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "attempts.jsonl").read_text().splitlines()]


def supervised(folder: Path, body: str, retries: int = 3) -> tuple[int, list[dict]]:
    status = Supervisor(script(folder, body), folder / "run", retries, wait=0.01, longest_wait=0.04).run()
    return status, attempts(folder)


def test_a_crash_then_success(tmp_path: Path) -> None:
    status, log = supervised(tmp_path, "save(f'step-{turn}')\nsys.exit(1 if turn < 2 else 0)")
    assert status == 0
    assert [(each["status"], each["checkpoint"]) for each in log] == [(1, "step-0"), (1, "step-1"), (0, "step-2")]
    assert [each["final"] for each in log] == ["", "", "done"]


def test_a_crash_loop_stops(tmp_path: Path) -> None:
    """Killed by signal 9 each time, nothing saved: the first attempt and three more."""
    status, log = supervised(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    assert (status, len(log)) == (137, 4)
    assert log[-1]["final"] == "4 attempts in a row without a newer checkpoint"


def test_progress_resets_the_count(tmp_path: Path) -> None:
    """Two crashes, one after a checkpoint, two crashes: with at most one retry in a row the third without progress ends it."""
    status, log = supervised(tmp_path, "save('a') if turn == 1 else None\nsys.exit(3)", retries=1)
    assert status == 3 and [each["checkpoint"] for each in log] == [None, "a", "a"]


@pytest.mark.parametrize(("status", "why"), [(2, "fix"), (76, "asked to stop, saved"), (130, "Ctrl-C")])
def test_final_statuses_are_not_restarted(status: int, why: str, tmp_path: Path) -> None:
    found, log = supervised(tmp_path, f"sys.exit({status})")
    assert (found, len(log)) == (status, 1) and why in log[0]["final"]


def test_a_lost_run_is_restarted(tmp_path: Path) -> None:
    assert supervised(tmp_path, "sys.exit(75 if turn == 0 else 0)")[0] == 0


def test_the_status_of_the_first_rank_wins_over_its_launcher(tmp_path: Path) -> None:
    """torchrun exits with 1 whatever its ranks exit with: rank 0 writes its 2 to a file."""
    body = "open(os.environ['MEGATRONISH_STATUS_FILE'], 'w').write('2')\nsys.exit(1)"
    status, log = supervised(tmp_path, body)
    assert (status, len(log)) == (2, 1)


def test_the_status_file_is_written_by_rank_0(tmp_path: Path) -> None:
    code = "from megatronish.launch.exit import run_program; run_program(lambda: 7)"
    for rank in "01":
        env = {**os.environ, "MEGATRONISH_STATUS_FILE": str(tmp_path / rank), "RANK": rank}
        assert subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT).returncode == 7
    assert (tmp_path / "0").read_text() == "7" and not (tmp_path / "1").exists()


def test_a_signal_goes_to_the_ranks_and_ends_the_attempts(tmp_path: Path) -> None:
    """A launcher that a signal would kill, and below it a rank with a child: only the rank receives it, saves and exits with 76."""
    body = """
    import subprocess
    child = "import time; open('child','w').close(); time.sleep(600)"
    rank = '''
    import os, signal, subprocess, sys
    worker = subprocess.Popen([sys.executable, "-c", CHILD])
    def stop(number, frame):
        open("heard", "w").write(f"{number} {worker.poll()}")
        worker.kill()
        open(os.environ["MEGATRONISH_STATUS_FILE"], "w").write("76")
        os._exit(76)
    signal.signal(signal.SIGUSR1, stop)
    open("ready", "w").close()
    while True:
        signal.pause()
    '''
    import textwrap
    text = textwrap.dedent(rank).replace("CHILD", repr(child))
    status = subprocess.run([sys.executable, "-c", text], env={**os.environ, "RANK": "0"}, cwd=run).returncode
    sys.exit(1)
    """
    command = script(tmp_path, body)
    mine = [sys.executable, str(ROOT / "launchers/supervise.py"), "--run-dir", str(tmp_path / "run"), "--", *command]
    supervisor = subprocess.Popen(mine, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not all((tmp_path / "run" / name).exists() for name in ("ready", "child")):
            assert time.monotonic() < deadline and supervisor.poll() is None
            time.sleep(0.02)
        supervisor.send_signal(signal.SIGUSR1)
        _, output = supervisor.communicate(timeout=LIMIT_SECONDS)
    finally:
        supervisor.kill()
    assert supervisor.returncode == 76, output
    assert (tmp_path / "run" / "heard").read_text() == f"{int(signal.SIGUSR1)} None", "its child did not hear it"
    assert len(attempts(tmp_path)) == 1 and "asked to stop, saved" in output


def test_the_run_folder_is_read_from_the_command(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"megatronish": {"train": {"save_dir": "runs/x"}}}))
    words = ["deepspeed", "launchers/pretrain.py", "--deepspeed_config", str(file)]
    assert run_folder(words) == Path("runs/x")
    assert run_folder([*words, "--train.save_dir=runs/y"]) == Path("runs/y")
    assert run_folder([*words, "--train.save_dir", "runs/z"]) == Path("runs/z")
    with pytest.raises(ConfigError, match="give --run-dir"):
        run_folder(["deepspeed", "launchers/pretrain.py"])


def test_a_missing_command(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert Supervisor(["no-such-command"], tmp_path / "run", 3, 0.01, 0.01).run() == 2
    assert len(attempts(tmp_path)) == 1
