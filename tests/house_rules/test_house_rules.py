"""Rules of the house style that no linter holds."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "server/janus_server",
    "kernels/janus_kernels",
    "scheduler/janus_scheduler",
    "proto/janus_proto",
    "bench/janus_bench",
}
GENERATED = re.compile(r"_pb2(_grpc)?\.py$")
SOURCES = sorted(
    path
    for top in PACKAGES
    for path in (ROOT / top).rglob("*.py")
    if not GENERATED.search(path.name)
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize(("paths", "limit"), [(SOURCES, 400), (TESTS, 500)])
def test_files_are_short(paths: list[Path], limit: int) -> None:
    assert paths
    assert [path for path in paths if len(path.read_text().splitlines()) > limit] == []


def test_functions_are_short() -> None:
    def limit(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
        jitted = any("triton.jit" in ast.unparse(node) for node in function.decorator_list)
        return 120 if jitted else 50

    long = [
        f"{path.relative_to(ROOT)}:{function.name}"
        for path in SOURCES
        for function in functions(path)
        if (function.end_lineno or 0) - function.lineno + 1 > limit(function)
    ]
    assert long == []


def test_no_drawer_for_everything() -> None:
    drawers = re.compile(r"(common|helpers?|utils?|misc)(\.py)?$")
    assert [path for path in SOURCES if any(drawers.fullmatch(part) for part in path.parts)] == []


def class_names(paths: list[Path]) -> list[str]:
    return [
        node.name
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    ]


def test_each_class_name_means_one_thing() -> None:
    names = class_names(SOURCES)
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_no_variable_is_called_one() -> None:
    # A name says what a variable holds.
    named = [
        f"{path}:{node.lineno}"
        for path in (*SOURCES, *(ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Name) and node.id == "one" and isinstance(node.ctx, ast.Store))
        or (isinstance(node, ast.arg) and node.arg == "one")
    ]
    assert named == []


def test_no_class_mirrors_a_message() -> None:
    # The scheduler may not import protos: its values and the messages that carry them share names.
    own = [path for path in SOURCES if not path.is_relative_to(ROOT / "scheduler")]
    messages = class_names(sorted((ROOT / "proto").rglob("*_pb2*.pyi")))
    assert messages
    assert set(class_names(own)) & set(messages) == set()


def test_only_packages_beside_packages() -> None:
    for package in PACKAGES:
        loose = [path.name for path in (ROOT / package).parent.glob("*.py")]
        assert loose == []


def test_environment_is_read_nowhere() -> None:
    readers = re.compile(r"\bos\.(environ(?!\[\"\w+\"\] = |\.setdefault\()|getenv)\b")
    assert [path for path in SOURCES if readers.search(path.read_text())] == []


def test_no_pickle_and_no_remote_code() -> None:
    loaders = re.compile(r"import (pickle|dill)\b|\btorch\.load\b|trust_remote_code")
    assert [path for path in SOURCES if loaders.search(path.read_text())] == []


def test_broad_except_only_where_a_fault_is_contained() -> None:
    allowed = {
        "bench/janus_bench/routing_traces.py",  # the library's list of errors is open
        "janus_server/attention/engine.py",  # ends the requests of a step
        "janus_server/attention/engine_thread.py",  # ends a request that cannot be taken up
        "janus_server/attention/runner.py",  # walks the experts to the step's end, raises again
        "janus_server/attention/sampler.py",  # ends the request of a row
        "janus_server/attention/step_exchange.py",  # gives the peers up, by name
        "janus_server/comm/work_thread.py",  # hands on what ended the thread
        "janus_server/controller/activity.py",  # a report must not cost a heartbeat
        "janus_server/endpoint/tokenizer.py",  # the library raises nothing narrower
        "janus_server/endpoint/tokenizer_file.py",  # alike
        "server/janus_server/grpc_calls.py",  # ends the call with INTERNAL
        "server/janus_server/grpc_connections.py",  # looks again later
        "janus_server/experts/runner.py",  # answers NaN, which ends the requests of a step
    }
    broad = re.compile(r"except (Base)?Exception\b|except:")
    offenders = {path for path in SOURCES if broad.search(path.read_text())}
    assert {"/".join(path.parts[-3:]) for path in offenders} == allowed


def config_classes() -> Iterator[ast.ClassDef]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                decorators = " ".join(map(ast.unparse, node.decorator_list))
                if "dataclass" in decorators:
                    assert "frozen=True, kw_only=True, slots=True" in decorators, node.name
                    yield node


def test_every_config_field_says_what_it_means() -> None:
    classes = list(config_classes())
    assert len(classes) > 8
    silent = []
    for node in classes:
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and "Config" not in ast.unparse(field.annotation):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                if not documented:
                    silent.append(f"{node.name}.{ast.unparse(field.target)}")
    assert silent == []


def test_every_number_on_a_command_line_has_bounds() -> None:
    fields_of = {
        node.name: {
            ast.unparse(field.target): ast.unparse(field.annotation)
            for field in node.body
            if isinstance(field, ast.AnnAssign)
        }
        for node in config_classes()
    }
    call = re.compile(r"\b(?:parse|run)\((?:\"\w+\", )?(\w+Config)\b")
    parsed = [name for path in SOURCES for name in call.findall(path.read_text())]
    assert {"ServeConfig", "AttentionConfig", "ExpertConfig", "GenerateConfig"} <= set(parsed)
    for name in parsed:
        parsed += set(fields_of[name].values()) & set(fields_of) - set(parsed)
    unbounded = {
        f"{name}.{field}"
        for name in parsed
        for field, kind in fields_of[name].items()
        if re.search(r"\b(int|float)\b", kind) and "Between(" not in kind
    }
    assert unbounded == set()


@pytest.mark.parametrize(
    "module", ["config", "launch", "cli", "generate", "endpoint.service", "model.checkpoint"]
)
def test_imports_without_torch(module: str) -> None:
    script = f"import sys, janus_server.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0


def test_generated_protos_are_up_to_date(tmp_path: Path) -> None:
    protoc = importlib.import_module("grpc_tools.protoc")
    protos = sorted((ROOT / "proto").rglob("*.proto"))
    outputs = ("python_out", "grpc_python_out", "mypy_out", "mypy_grpc_out")
    options = [f"--{name}={'quiet:' if 'mypy' in name else ''}{tmp_path}" for name in outputs]
    bin_folder = Path(sys.executable).parent
    plugins = [
        f"--plugin=protoc-gen-{name}={bin_folder / f'protoc-gen-{name}'}"
        for name in ("mypy", "mypy_grpc")
    ]
    arguments = ["protoc", f"-I{ROOT / 'proto'}", *plugins, *options, *map(str, protos)]
    assert protoc.main(arguments) == 0
    generated = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(generated) == 4 * len(protos)
    for path in generated:
        committed = ROOT / "proto" / path.relative_to(tmp_path)
        assert committed.read_text() == path.read_text(), f"run `make proto`: {committed.name}"


def test_the_repository_speaks_of_the_project_alone() -> None:
    machine_paths = re.compile(r"(?<![\w.])/(work|root|tmp)/[A-Za-z]|\.\./shared")
    files = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "*.py", "*.md", "*.toml", "*.proto", "Makefile"],
        capture_output=True,
        text=True,
        check=True,
        timeout=10,
    ).stdout.split()
    own = Path(__file__).relative_to(ROOT).as_posix()
    offenders = [
        name
        for name in files
        if name != own
        and (ROOT / name).exists()
        and machine_paths.search((ROOT / name).read_text())
    ]
    assert offenders == []
