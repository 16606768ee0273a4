"""What C++ prints: gloo's greetings are dropped, everything else arrives."""

import subprocess
import sys

from conftest import REPOSITORY

SCRIPT = """
import os, subprocess, sys
sys.path.insert(0, REPOSITORY)
from bigjax.run import noise

before = sys.stdout
with noise.dropped():
    print("from Python: \\u00e9")
    said = b"[Gloo] Rank %d is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\\n"
    os.write(1, said % 0 + b"from C++, [Gloo] Rank within\\n17\\n" + said % 12)
    os.write(1, b"[Gloo] Rank [Gloo] Rank 23 is connected to  is connected to 77 peer ranks. ")
    os.write(1, b"Expected number of connected peer ranks is :  peer ranks. 7\\n7\\n\\nno end of line")
    subprocess.run(["echo", " from a child"])
    try:
        with noise.dropped():
            print("nested")
            sys.stdout.flush()
            raise KeyError
    except KeyError:
        pass
    os.write(2, b"[Gloo] an error\\n")
assert sys.stdout is before
print("after")
sys.stdout.flush()
os.write(1, b"[Gloo] after\\n")
"""


def test_only_its_lines_are_dropped() -> None:
    script = SCRIPT.replace("REPOSITORY", repr(str(REPOSITORY)))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode("utf-8").splitlines()
    assert sorted(lines[:-2]) == sorted(
        ["from Python: é", "from C++, [Gloo] Rank within", "17", "no end of line from a child", "nested"]
    )
    assert lines[-2:] == ["after", "[Gloo] after"] and done.stderr == b"[Gloo] an error\n"


def test_a_terminal_that_is_lost_is_told_once_and_stops_nothing() -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(REPOSITORY)!r})
from bigjax.run import noise
with noise.dropped():
    os.write(1, b"from C++\\n")
    for i in range(3):
        print("from Python", flush=True)
    sys.stdin.read()
    for i in range(3):
        print("lost", flush=True)
        os.write(1, b"lost\\n")
print("the end", file=sys.stderr)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        assert sorted(process.stdout.readline() for _ in range(4)) == [b"from C++\n", *[b"from Python\n"] * 3]
        process.stdout.close()
        process.stdin.close()
        told = process.stderr.read().decode().splitlines()
    lost = "standard output takes nothing any more (Broken pipe): the run goes on without it"
    assert process.returncode == 0 and told == [lost, "the end"]


def test_a_stdout_that_is_not_the_process_s_own_is_left(capsys) -> None:
    from bigjax.run import noise

    before = sys.stdout
    with noise.dropped():
        assert sys.stdout is before
