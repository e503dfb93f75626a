"""What is packed: the version, the generated code, the examples."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PACKAGE, ROOT

import plumb_client
from plumb_client._proto import common_pb2, generation_pb2, models_pb2, preference_pb2, tokens_pb2, wire_pb2

GENERATED = [common_pb2, generation_pb2, models_pb2, preference_pb2, tokens_pb2, wire_pb2]


def test_the_version_is_that_of_the_workspace():
    manifest = (ROOT / "Cargo.toml").read_text()
    [version] = re.findall(r'(?m)^version = "(.+)"$', manifest)
    assert plumb_client.__version__ == version


@pytest.mark.parametrize("module", GENERATED, ids=lambda module: module.DESCRIPTOR.name)
def test_the_generated_code_is_that_of_the_proto(module, tmp_path):
    protoc = pytest.importorskip("grpc_tools.protoc", reason="there is no grpcio-tools")
    from google.protobuf import descriptor_pb2

    name, out = module.DESCRIPTOR.name, tmp_path / "set"
    wellknown = Path(protoc.__file__).parent / "_proto"
    folders = [f"-I{folder}" for folder in (ROOT / "proto", PACKAGE, wellknown)]
    assert protoc.main(["protoc", *folders, f"--descriptor_set_out={out}", name]) == 0
    [wanted] = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file
    found = descriptor_pb2.FileDescriptorProto()
    module.DESCRIPTOR.CopyToProto(found)
    # Newer compilers write names for JSON that can be derived.
    texts = [re.sub(r' *json_name: ".*"\n', "", str(file)) for file in (found, wanted)]
    assert texts[0] == texts[1], "run client/python/generate.sh"


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_what_is_built_can_be_imported(kind, tmp_path):
    pytest.importorskip("hatchling", reason="there is no hatchling")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", tmp_path], cwd=PACKAGE, check=True)
    [built] = tmp_path.iterdir()
    shutil.unpack_archive(built, tmp_path / "in", "zip" if kind == "wheel" else "gztar")
    inside = {str(path.relative_to(tmp_path / "in")) for path in (tmp_path / "in").rglob("*") if path.is_file()}
    named = f"plumb_client-{plumb_client.__version__}"
    licence, source = (
        (f"{named}.dist-info/licenses/LICENSE", ".") if kind == "wheel" else (f"{named}/LICENSE", f"{named}/src")
    )
    assert {licence, str(Path(source, "plumb_client/py.typed"))} <= inside
    code = "import plumb_client.aio as package; print(package.__file__)"
    environment = {"PYTHONPATH": str(tmp_path / "in" / source)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.startswith(str(tmp_path)), done.stderr


def test_every_service_of_the_contract_has_its_methods():
    wanted = {
        f"/{service.full_name}/{method}"
        for module in GENERATED
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods_by_name
    }
    calls = (PACKAGE / "src/plumb_client/_calls.py").read_text()
    found = {f"/plumb.v1.{name}" for name in re.findall(r'"(?:/plumb\.v1\.)?(\w+/\w+)"', calls)}
    # Many items go out as calls of their own, which can be tried again one by one.
    assert wanted - found == {"/plumb.v1.Preference/ScoreStream"}


def test_the_examples_of_the_readme(server, monkeypatch):
    pytest.importorskip("pandas")
    monkeypatch.setenv("PLUMB_SERVER", server.url)
    names: dict[str, object] = {}
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", (PACKAGE / "README.md").read_text())
    assert len(blocks) >= 6
    for block in blocks:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(block, "README.md", "exec"), names)
        shown = [line.removeprefix("# ->").strip() for line in block.splitlines() if line.startswith("# ->")]
        assert [line.strip() for line in said.getvalue().splitlines()] == shown


def test_nothing_else_is_imported():
    modules = "plumb_client.aio, plumb_client.data, plumb_client.ray, plumb_client.trl"
    others = "{'pandas', 'datasets', 'tqdm', 'ray', 'pyarrow', 'torch', 'transformers', 'trl'}"
    code = f"import sys, {modules}; print({others} & set(sys.modules))"
    environment = {"PYTHONPATH": str(PACKAGE / "src"), "PYTHONWARNINGS": "error"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
