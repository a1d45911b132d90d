"""A deployment written down for Kubernetes, instead of clustering of our own: replicas, a router, their addresses."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from string import Template

from muster.errors import UsageError

SETTLE_S = 5
"""Between being told to stop and stopping, in which the cluster's proxies learn of it."""
FINISH_S = 40
"""For what is being answered then: more than a server takes at most."""
IMAGE = "musterllm:latest"
"""To be replaced by an image with muster in it."""


def kubernetes(name: str, *, replicas: int, port: int, options: Sequence[str]) -> str:
    """YAML of a StatefulSet of `muster serve /model OPTIONS`, a Deployment of the router, and their Services."""
    label = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:40].strip("-")
    if not label or not label[0].isalpha():
        raise UsageError(
            f"'{name}' makes no name in Kubernetes: rename the model's folder to begin with a letter"
        )
    upstreams = [f"http://{label}-{index}.{label}-replicas:{port}" for index in range(replicas)]
    listening = ["--host", "0.0.0.0", "--port", str(port)]
    routing = [text for url in upstreams for text in ("--upstream", url)]
    template = Template(files("muster.serve.router").joinpath("kubernetes.yaml").read_text())
    return template.substitute(
        name=label,
        replicas=replicas,
        port=port,
        image=IMAGE,
        settle_s=SETTLE_S,
        grace_s=SETTLE_S + FINISH_S,
        replica_command=json.dumps(["muster", "serve", "/model", *listening, *options]),
        router_command=json.dumps(["muster", "serve", *routing, *listening]),
    )
