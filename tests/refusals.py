"""How a command refuses: by one line on stderr and exit code 2."""

import pytest

from pictures import but_what_was_opened


def error_of(capsys, command, *arguments, alone=False):
    """The line with which command(*arguments) stops, its last one on stderr.

    alone: nothing else is said there but which images were opened."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(*arguments)
    assert stop.value.code == 2
    lines = but_what_was_opened(capsys.readouterr().err).splitlines()
    assert lines[-1].startswith("error: ") and sum(line.startswith("error") for line in lines) == 1
    assert not alone or len(lines) == 1, lines
    return lines[-1]
