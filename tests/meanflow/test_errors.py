"""A user's mistake is one line and exit code 2."""

import pytest

from meanflow.errors import UserError, exit_on_user_error


def test_what_a_library_writes_on_several_lines_is_one(capsys):
    with pytest.raises(SystemExit) as stopped, exit_on_user_error():
        raise UserError("cannot open x: wrong name\n\n  The format is:\n    NAME")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: cannot open x: wrong name The format is: NAME\n"
