"""A process may end at any time: what still runs in the background neither crashes nor delays it."""

import signal
import subprocess
import sys

import pytest

from specdec import SpecDecoder
from specdec.base import files
from specdec.drafters import corpus
from specdec.models.catalogue import DEFAULT_MODEL

pytestmark = pytest.mark.model

LOAD = "from specdec import SpecDecoder; decoder = SpecDecoder.from_pretrained(learn=True)"
COMMAND = "from specdec.cli import main; import sys; sys.argv[1:] = {}; main()"
ENDS = {  # code of a process, and its exit status
    "loads": (LOAD, 0),
    "forgets what it loaded": (f"{LOAD}; del decoder", 0),
    "takes another drafter": (f"{LOAD}; decoder = decoder.with_drafter('ngram')", 0),
    "fails": (f"{LOAD}; decoder.generate('a', max_new_tokenz=5)", 1),
    "is interrupted": (f"{LOAD}; import signal; signal.raise_signal(signal.SIGINT)", -signal.SIGINT),
    "fails to load": ("from specdec import SpecDecoder; SpecDecoder.from_pretrained(runtimes='native')", 1),
    "leaves an engine": (
        f"{LOAD}; engine = decoder.engine(); handle = engine.submit(decoder.request('Hello', max_new_tokens=4000, "
        "ignore_eos=True)); next(iter(handle))",
        0,
    ),
    "leaves a stream": (
        f"{LOAD}; stream = decoder.stream('Hello', max_new_tokens=400, ignore_eos=True); next(stream)",
        0,
    ),
    "chats with nobody": (COMMAND.format(["chat"]), 0),
    "has nothing to learn": (COMMAND.format(["learn", DEFAULT_MODEL, "--minutes", "0.01"]), 2),
}


USUAL = "loads", "leaves an engine", "leaves a stream", "chats with nobody"
RUNS = [pytest.param(what, 1, True, id=what) for what in USUAL]
RUNS += [
    pytest.param(what, 3, kept, id=f"{what}, a {'kept' if kept else 'new'} corpus", marks=pytest.mark.slow)
    for what in ENDS
    for kept in (True, False)
]


@pytest.mark.parametrize(("what", "times", "kept"), RUNS)
def test_a_process_ends_whatever_still_runs(what: str, times: int, kept: bool) -> None:
    code, status = ENDS[what]
    tokenizer = SpecDecoder.from_pretrained(drafter="none").tokenizer
    for _ in range(times):
        if kept:
            corpus.corpus(tokenizer, 1)
        else:
            for file in files.cache_dir().glob("ngram/*"):
                file.unlink()
        done = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == status and "ignored" not in done.stderr, done.stderr
