"""deploy/kubernetes.yaml: its schema, probes, rights, and how a server ends."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.cli.main import COMMANDS
from pipeline.cli.options import parse_options
from pipeline.serving.settings import ServerSettings
from tests.helpers.linters import lint

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "deploy" / "kubernetes.yaml"
DEPLOYMENT, SERVICE = yaml.safe_load_all(MANIFEST.read_text())
POD = DEPLOYMENT["spec"]["template"]["spec"]
SERVER = POD["containers"][0]


def problems(path: Path) -> str:
    """What the linter says where it does not say that both resources are valid. It skips a kind
    that it does not know."""
    status, found = lint("kubernetes-validate", "--strict", path)
    return "" if status == 0 and found.count("passed for resource") == 2 else found


def test_the_linter_finds_nothing():
    assert problems(MANIFEST) == ""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("replicas: 2", "replicas: two", "'two' is not of type"),
        ("      automountServiceAccount", "      automount", "'automountToken' was unexpected"),
        ("kind: Service\n", "kind: Serviced\n", "find schema for kind Serviced"),
    ],
)
def test_the_linter_sees_what_is_wrong(tmp_path, old, new, words):
    text = MANIFEST.read_text()
    assert text.count(old) == 1
    path = tmp_path / "kubernetes.yaml"
    path.write_text(text.replace(old, new))
    assert words in problems(path)


def test_probes_ask_what_the_server_has():
    probes = {name: SERVER[f"{name}Probe"]["httpGet"]["path"] for name in ("readiness", "liveness")}
    assert probes == {"readiness": "/readyz", "liveness": "/healthz"}


def test_the_server_has_the_options_of_its_command():
    command, *options = SERVER["args"]
    assert parse_options(command, COMMANDS[command], options)["host"] == "0.0.0.0"


def test_running_requests_are_finished_before_the_pod_is_killed():
    before = SERVER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["terminationGracePeriodSeconds"] >= before + ServerSettings.grace + 10


def test_the_service_leads_to_the_pods():
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    assert SERVICE["spec"]["selector"] == DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    assert SERVICE["spec"]["ports"][0]["targetPort"] == SERVER["ports"][0]["name"]


def test_a_pod_has_no_rights_and_reads_its_tokens_from_a_secret():
    assert POD["securityContext"]["runAsNonRoot"] and not POD["automountServiceAccountToken"]
    rights = SERVER["securityContext"]
    assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}
    tokens = next(one for one in POD["volumes"] if one["name"] == "tokens")["secret"]
    assert tokens["defaultMode"] == 0o440  # of the pod's group, which fsGroup names
    folder = next(one for one in SERVER["volumeMounts"] if one["name"] == "tokens")["mountPath"]
    assert f"{folder}/tokens" in SERVER["args"]


def test_urls_are_refused_where_there_are_several_servers():
    assert DEPLOYMENT["spec"]["replicas"] == 1 or "--refuse-urls" in SERVER["args"]
