"""The command tree without a mesh: what it loads, what it says when something is wrong, what the pages promise."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flowmesh_cas import errors
from flowmesh_mesh.cli import app as tree
from flowmesh_mesh.cli.app import COMMANDS, app
from flowmesh_mesh.cli.failure import INTERNAL, INTERRUPTED, boundary
from flowmesh_mesh.roles import ROLES

ROOT = Path(__file__).parents[3]
VALID = """\
apiVersion: flowmesh/v1
name: tiny
params: {n: {type: int, default: 1}}
operators:
  a: {type: flow.noop, with: {nonce: "${params.n}"}}
outputs: {out: a.out}
"""


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLOWMESH_CONTEXT", raising=False)
    return CliRunner()


def test_help_lists_every_command_and_imports_none_of_them() -> None:
    script = (
        "import sys; from typer.testing import CliRunner; from flowmesh_mesh.cli.app import app\n"
        "result = CliRunner().invoke(app, ['--help']); print(result.stdout)\n"
        "loaded = [m for m in sys.modules if m.startswith(('flowmesh_deploy', 'flowmesh_scheduler', 'flowmesh_mesh.cli.'))]\n"
        "print('LOADED', sorted(loaded))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert all(re.search(rf"\b{name}\b", done.stdout) for name in COMMANDS)
    loaded = done.stdout.rpartition("LOADED")[2].strip()
    assert loaded == "['flowmesh_mesh.cli.app', 'flowmesh_mesh.cli.failure']"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_help_of_its_own(name: str, runner: CliRunner) -> None:
    result = runner.invoke(app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert name in result.output


def test_an_unknown_command_is_a_usage_error(runner: CliRunner) -> None:
    assert runner.invoke(app, ["sbmit"]).exit_code == 2


def test_a_valid_workflow_is_told_with_its_cid(runner: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(VALID)
    result = runner.invoke(app, ["validate", "w.yaml", "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["valid"], document["operators"], document["outputs"]) == (True, 1, ["out"])
    other = json.loads(runner.invoke(app, ["validate", "w.yaml", "--json", "--param", "n=2"]).stdout)
    assert other["manifest"] != document["manifest"]


def test_all_problems_are_told_with_their_places(runner: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(VALID.replace("flow.noop", "flow.nop") + "extra: 1\n")
    result = runner.invoke(app, ["validate", "w.yaml", "--json"])
    assert result.exit_code == 2
    problems = json.loads(result.stdout)["error"]["problems"]
    assert {problem["path"] for problem in problems} >= {"operators.a.type", "extra"}
    assert "w.yaml:5:" in result.stderr
    assert "hint:" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["validate", "none.yaml"], 4, "there is no workflow file none.yaml"),
        (["submit", "w.yaml"], 4, "no mesh found"),
        (["ls"], 4, "flowmesh up"),
        (["ls", "--tenant", "a*"], 2, "tenant name 'a*' is not allowed"),
        (["show", "a.b"], 2, "run name 'a.b' is not allowed"),
        (["show", "x" * 300], 2, "is not allowed"),
        (["watch", "a b"], 2, "run name 'a b' is not allowed"),
        (["cancel", "*"], 2, "run name '*' is not allowed"),
        (["logs", "abc", "o>p"], 2, "operator name 'o>p' is not allowed"),
        (["get", "abc.*"], 2, "is not allowed"),
        (["get", "abc", "-o", "w.yaml"], 2, "is not a folder"),
        (["lineage", "a b"], 2, "is not allowed"),
        (["submit", "w.yaml", "--run", "a b"], 2, "run name 'a b' is not allowed"),
        (["submit", "w.yaml", "--param", "x"], 2, "is not NAME=VALUE"),
        (["submit", "w.yaml", "--param", "x=1"], 2, "no parameter 'x'"),
        (["ls", "--context", "nowhere"], 4, "cannot read the context"),
    ],
)
def test_wrong_input_is_told_with_its_exit_code(
    runner: CliRunner, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    (tmp_path / "w.yaml").write_text(VALID)
    result = runner.invoke(app, arguments)
    assert result.exit_code == code, result.output
    assert said in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_a_parameter_of_two_megabytes_is_refused_and_not_repeated(runner: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(VALID.replace("type: int, default: 1", "type: str").replace("${params.n}", "1"))
    (tmp_path / "big").write_text("x" * 2_000_000)
    result = runner.invoke(app, ["validate", "w.yaml", "--param", "n=@big"])
    assert result.exit_code == 2
    assert "2000002 bytes" in result.stderr
    assert len(result.output) < 1000


def test_a_document_and_a_stream_exclude_each_other(runner: CliRunner) -> None:
    result = runner.invoke(app, ["logs", "abc", "-f", "--json"])
    assert result.exit_code == 2
    assert "cannot follow" in json.loads(result.stdout)["error"]["message"]


def _exit_code(monkeypatch: pytest.MonkeyPatch, runner: CliRunner, error: BaseException) -> tuple[int, str, str]:
    import typer

    def failing(as_json: bool = False) -> None:
        raise error

    made = typer.Typer(pretty_exceptions_enable=False)
    made.command()(boundary(failing))
    result = runner.invoke(made, ["--as-json"])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("name", [name for name in vars(errors) if name.endswith("Error") and name != "FlowmeshError"])
def test_each_class_of_error_has_its_exit_code_and_the_page_names_it(
    name: str, runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(errors, name)
    code, stdout, stderr = _exit_code(monkeypatch, runner, kind("it went wrong", hint="Mend it."))
    assert code == kind.exit_code
    assert json.loads(stdout)["error"]["hint"] == "Mend it."
    assert stderr == "error: it went wrong\nhint: Mend it.\n"
    assert re.search(rf"^\| {code} \|", (ROOT / "docs/cli.md").read_text(), re.MULTILINE)


def test_our_own_faults_are_told_without_a_traceback_unless_asked_for(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    code, stdout, stderr = _exit_code(monkeypatch, runner, KeyError("x"))
    assert code == INTERNAL
    assert "KeyError: 'x'" in stderr
    assert "FLOWMESH_DEBUG=1" in json.loads(stdout)["error"]["hint"]
    monkeypatch.setenv("FLOWMESH_DEBUG", "1")
    assert _exit_code(monkeypatch, runner, KeyError("x"))[0] == 1


def test_an_interrupt_has_the_exit_code_of_its_signal(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _exit_code(monkeypatch, runner, KeyboardInterrupt())[0] == INTERRUPTED


def test_a_command_that_another_component_brings_is_found_by_its_entry_point(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree, "_plugins", lambda: {"extra": "platform:python_version"})
    listed = re.findall(r"^  (\w+) ", runner.invoke(app, ["--help"]).output, re.MULTILINE)
    assert "extra" in listed
    assert "submit" in listed
    assert "up" not in listed


def test_the_page_of_the_command_line_names_every_command_and_no_other() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    named = set(re.findall(r"`flowmesh ([a-z]+)", page))
    assert named == set(COMMANDS)


def test_the_table_of_rights_in_the_protocol_is_the_one_that_the_broker_enforces() -> None:
    page = (ROOT / "docs/protocol.md").read_text()
    table = page.split("<!-- roles -->")[1].split("<!-- /roles -->")[0].strip().splitlines()[2:]
    assert table == [_role_line(role) for role in ROLES]


def _role_line(role: Any) -> str:
    publish, subscribe = (", ".join(f"`{subject}`" for subject in some) or "nothing" for some in (role.publish, role.subscribe))
    return f"| {role.name} | {role.account} | {publish} | {subscribe} | {'yes' if role.responses else 'no'} |"


def test_every_message_of_the_wire_stands_in_the_protocol() -> None:
    import msgspec

    from flowmesh_mesh import messages

    page = (ROOT / "docs/protocol.md").read_text()
    kinds = [kind for kind in vars(messages).values() if isinstance(kind, type) and issubclass(kind, msgspec.Struct)]
    tags = {str(kind.__struct_config__.tag) for kind in kinds if kind.__struct_config__.tag}
    assert {tag for tag in tags if "/" in tag and f"`{tag}`" not in page} == set()
