"""The YAML for Kubernetes: what its parts say of each other has to agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from muster.cli.serve import serve
from muster.errors import UsageError
from muster.serve.limits import Limits
from muster.serve.router.manifest import kubernetes


def test_a_manifest_names_each_replica_and_gives_it_time(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(folder, replicas=3, port=9000, streams=5, manifest="kubernetes")
    replicas, inside, router, outside = YAML(typ="safe", pure=True).load_all(capsys.readouterr().out)
    kinds = [one["kind"] for one in (replicas, inside, router, outside)]
    assert kinds == ["StatefulSet", "Service", "Deployment", "Service"]
    assert replicas["metadata"]["name"] == outside["metadata"]["name"] == "small-run"
    assert replicas["spec"]["replicas"] == 3
    assert replicas["spec"]["serviceName"] == inside["metadata"]["name"]
    assert inside["spec"]["clusterIP"] == "None"
    for service, workload in ((inside, replicas), (outside, router)):
        assert service["spec"]["selector"] == workload["spec"]["selector"]["matchLabels"]
        assert service["spec"]["selector"] == workload["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["ports"] == [{"port": 9000}]
    for workload in (replicas, router):
        pod = workload["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["readinessProbe"]["httpGet"] == {"path": "/health/ready", "port": 9000}
        settle_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod["terminationGracePeriodSeconds"] > settle_s + Limits(context_tokens=1).shutdown_s
    command = replicas["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:3] == ["muster", "serve", "/model"]
    assert command[command.index("--streams") + 1] == "5"
    routed: list[Any] = router["spec"]["template"]["spec"]["containers"][0]["command"]
    urls = [routed[place + 1] for place, word in enumerate(routed) if word == "--upstream"]
    assert urls == [f"http://small-run-{index}.small-run-replicas:9000" for index in range(3)]


def test_names_become_labels_or_are_refused() -> None:
    assert "name: my-model-7b\n" in kubernetes("My_Model.7B", replicas=1, port=1, options=[])
    with pytest.raises(UsageError, match="makes no name in Kubernetes"):
        kubernetes("7b", replicas=1, port=1, options=[])
    with pytest.raises(UsageError, match="give its PATH"):
        serve(upstream=["http://h:1"], manifest="kubernetes")
