"""``--config``: every option, its line when it is wrong, and what goes over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from runtimes.gateway.__main__ import main
from safevlm.errors import InputError

OPTIONS = [option for option in main.params if option.name not in ("config", "help")]


def parsed(tmp_path: Path, text: str, *arguments: str, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Return what the command would be called with."""
    path = tmp_path / "gateway.toml"
    path.write_text(text)
    found: dict[str, Any] = {}

    @click.command(params=main.params, context_settings=main.context_settings)
    def command(**given: Any) -> None:
        found.update(given)

    done = CliRunner().invoke(command, ["--config", str(path), *arguments], env=env or {})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return found


def good(option: click.Parameter) -> Any:
    """Return a value that the option takes and that is not its default."""
    kind = option.type
    if isinstance(kind, click.Choice):
        return kind.choices[-1]
    if isinstance(kind, click.types.BoolParamType):
        return True
    if isinstance(kind, click.IntRange):
        return 7
    if isinstance(kind, click.types.IntParamType):
        return 7
    if isinstance(kind, click.types.FloatParamType):
        return 0.25
    return ["one", "two"] if option.multiple else "some"


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: str(option.name))
def test_every_option_can_stand_in_the_file(tmp_path: Path, option: click.Parameter) -> None:
    value = good(option)
    for name in (str(option.name), str(option.name).replace("_", "-")):
        found = parsed(tmp_path, f"{name} = {json.dumps(value)}")[str(option.name)]
        assert found == (tuple(value) if isinstance(value, list) else value) or str(found) == value
    wrong = 5 if isinstance(value, str | list) else "five"
    with pytest.raises(Exception, match=rf"gateway\.toml:3: {option.name}"):
        parsed(tmp_path, f"# a comment\n\n{option.name} = {json.dumps(wrong)}\n")


def test_environment_over_file_and_command_line_over_both(tmp_path: Path) -> None:
    text, env = "max-images = 2\nqueue = 3\nbatch = 4\n", {"SAFEVLM_GATEWAY_QUEUE": "30", "SAFEVLM_GATEWAY_BATCH": "40"}
    found = parsed(tmp_path, text, "--batch", "400", env=env)
    assert (found["max_images"], found["queue"], found["batch"]) == (2, 30, 400)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("\nmax-image = 3\n", r"gateway\.toml:2: .*max-image; did you mean max-images"),
        ("a = 1\n\n\n\nzzzzzz = 3\n", r"gateway\.toml:1: unknown option a"),
        ("[server]\nport = 1\n", r"gateway\.toml:1: unknown option server"),
        ("port = 70000", r"gateway\.toml:1: port.*range"),
        ("port = true", r"gateway\.toml:1: port is True"),
        ("max-images = 2\nmax_images = 3\n", r"gateway\.toml:2: max_images is given twice"),
        ("port = \n", r"line 1"),
        ("port = 1\nport = 2\n", r"line 2"),
        ("config = 'x'", "unknown option config"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(Exception, match=said):
        parsed(tmp_path, text)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lines_are_counted_in_every_encoding_that_is_read(tmp_path: Path, encoding: str, ending: str) -> None:
    path = tmp_path / "gateway.toml"
    path.write_bytes(f"# café{ending}{ending}max-image = 1{ending}".encode(encoding))
    done = CliRunner().invoke(main, ["--config", str(path)])
    assert "gateway.toml:3: unknown option max-image" in str(done.exception)


def test_a_path_that_cannot_be_one_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gateway\.toml:2: bundle is 'a.*null"):
        parsed(tmp_path, '\nbundle = "a\\u0000b"')


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("CLIENT_KEY", "clients.toml", "did you mean SAFEVLM_GATEWAY_CLIENT_KEYS"),
        ("CLIENT_KEYS", "", "SAFEVLM_GATEWAY_CLIENT_KEYS is empty"),
        ("SERVICE_PORT_HTTP", "8080", "belongs to no option"),
    ],
)
def test_a_variable_that_would_be_passed_over_is_refused(name: str, value: str, said: str) -> None:
    done = CliRunner().invoke(main, [], env={f"SAFEVLM_GATEWAY_{name}": value})
    assert isinstance(done.exception, InputError) and said in str(done.exception)


def test_a_variable_that_holds_a_key_may_have_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEVLM_GATEWAY_KEY", "sk-1")
    done = CliRunner().invoke(main, ["--api-key-env", "SAFEVLM_GATEWAY_KEY"])
    assert "nothing to serve" in str(done.exception)


@pytest.mark.parametrize(
    "line", ['client-keys = "/no/file"', 'api-key-env = "NO_SUCH_KEY"', 'policy = "/no/p.toml"', 'host = "a..b"']
)
def test_every_error_has_the_line_of_the_option_that_it_is_about(tmp_path: Path, bundle: Path, line: str) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(f'bundle = "{bundle}"\nupstream = "http://127.0.0.1:9/v1"\n\n{line}\n')
    done = CliRunner().invoke(main, ["--config", str(path)])
    assert f"{path}:4: " in str(done.exception)


def test_a_value_that_only_the_gateway_can_judge_has_its_line_too(tmp_path: Path, bundle: Path) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(f'bundle = "{bundle}"\nupstream = "http://127.0.0.1:9/v1"\nidle-timeout = -1\n')
    done = CliRunner().invoke(main, ["--config", str(path)])
    assert "gateway.toml:3: idle_timeout is -1" in str(done.exception)


@pytest.mark.parametrize("option", [each for each in OPTIONS if each.type.name in ("integer range", "float")], ids=str)
def test_no_number_is_too_large_for_what_it_is_used_for(option: click.Parameter, bundle: Path) -> None:
    """Timers, limits and libraries hold less than Python's numbers do."""
    value = "1e300" if option.type.name == "float" else str(10**30)
    given = ["--bundle", str(bundle), "--upstream", "http://127.0.0.1:9/v1", "--host", "a..b", *option.opts, value]
    done = CliRunner().invoke(main, given)
    refused = done.exception
    assert isinstance(refused, InputError) or "is not in the range" in done.output, (refused, done.output)
    limited = ("port", "threads", "decode_memory_mb")
    assert ("a..b" in str(refused)) == (option.name not in limited and option.type.name != "float")
