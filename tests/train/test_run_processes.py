"""Several processes train one drafter: the weights are those of one process, and one of them speaks."""

import json
import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from tiny import save_tiny
from training import checkpoint_of
from typer.testing import CliRunner

from specdec.cli import app


def train(arguments: list[str], said: Path, rank: int, processes: int, port: int) -> None:
    """The command in a process of its own, as torchrun starts it."""
    PartialState._reset_state()
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    result = CliRunner().invoke(app, arguments)
    said.write_text(result.stdout if result.exit_code == 0 else result.output)
    os._exit(result.exit_code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")  # and test_gpu starts processes
def test_two_processes_train_the_weights_of_one(greedy: str, tmp_path: Path) -> None:
    folder, answers = save_tiny(tmp_path / "model"), tmp_path / "answers.jsonl"
    answers.write_text(greedy)
    given = {"segments": "[[2,4]]", "final_projection": "true", "rank": 4, "draft_vocab": 0}
    given |= {"rows": 4, "window": 8, "fit_tokens": 200}
    command = ["train", "m2r2", "--model", str(folder), "--prompts", str(answers), "--dtype", "float32"]
    command += ["--steps", "12", *(f"--set={key}={value}" for key, value in given.items())]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn, started = multiprocessing.get_context("spawn"), []
    for name, ranks in (("one", 1), ("two", 2)):
        for rank in range(ranks):
            arguments = [*command, "--output", str(tmp_path / name)], tmp_path / f"{name}{rank}", rank, ranks, port
            started.append(spawn.Process(target=train, args=arguments))
            started[-1].start()
    for process in started:
        process.join()
    said = [(tmp_path / name).read_text() for name in ("one0", "two0", "two1")]
    assert [process.exitcode for process in started] == [0, 0, 0], said
    assert ["mean acceptance length" in each for each in said] == [True, True, False]
    one, two = (checkpoint_of(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for key in one:  # sums in another order: float32 rounding, and Adam's division by small second moments
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=2e-5)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    assert [json.loads(a)["tokens"] for a in logs[0]] == [json.loads(b)["tokens"] for b in logs[1]]
