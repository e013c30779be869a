"""What compose.sh asks: whether the files of deploy/compose fit each other, and whether a dashboard is answered.

files RESOLVED CHOSEN ROOT     what `docker-compose config` said, by default and with every variable set,
                               and where it saw this clone
dashboard SERVER PROMETHEUS    addresses
"""

import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

CLONE = Path(__file__).resolve().parent.parent.parent


def mounts(service: dict[str, Any], root: str) -> dict[str, Path]:
    """Where in the container each folder or file of the clone is."""
    return {
        volume["target"]: CLONE / volume["source"].removeprefix(root).strip("/")
        for volume in service["volumes"]
        if volume["source"].startswith(f"{root}/")
    }


def read(mounted: dict[str, Path], path: str) -> Any:
    """The file that a container sees at this path."""
    target = max((target for target in mounted if path.startswith(target)), key=len)
    return yaml.safe_load((mounted[target] / path.removeprefix(target).strip("/")).read_text())


def files(resolved: str, chosen: str, root: str) -> None:
    """Everything that a file names is what another one offers."""
    services = json.loads(Path(resolved).read_text())["services"]
    server = services["server"]
    assert server["command"] == ["--model-id", "/data/model"] and server["read_only"], server
    assert server["build"]["context"] == root and server["build"]["target"] == "cpu", server["build"]
    port, published = next((port["target"], port) for port in server["ports"])
    assert published["host_ip"] == "127.0.0.1" and published["published"] == "8080", published
    assert server["restart"] == "on-failure:5", server["restart"]
    prometheus = mounts(services["prometheus"], root)
    scraped = read(prometheus, "/etc/prometheus/prometheus.yml")["scrape_configs"][0]["static_configs"][0]["targets"]
    assert scraped == [f"server:{port}"], scraped
    grafana = mounts(services["grafana"], root)
    source = read(grafana, "/etc/grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]
    assert source["type"] == "prometheus" and source["isDefault"], source
    asked = urllib.parse.urlsplit(source["url"])
    assert asked.hostname == "prometheus" and asked.port == services["prometheus"]["ports"][0]["target"], source
    folder = read(grafana, "/etc/grafana/provisioning/dashboards/dashboards.yaml")["providers"][0]["options"]["path"]
    assert list(grafana[folder].glob("*.json")) == [CLONE / "assets" / "grafana.json"], folder
    server = json.loads(Path(chosen).read_text())["services"]["server"]
    assert server["environment"] | {"QUANTIZE": "gptq", "NUM_SHARD": "2"} == server["environment"], server
    assert server["build"]["target"] == "cuda" and server["image"] == "text-generation:cuda", server
    assert server["volumes"][0]["source"] == "/somewhere", server
    assert server["ports"][0]["host_ip"] == "0.0.0.0" and server["environment"]["API_KEY"] == "secret", server


def get(address: str, **query: str) -> Any:
    """The JSON at an address; an error of HTTP is one of this program, with what was said."""
    try:
        with urllib.request.urlopen(f"{address}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{address} {query}: {error.code} {error.read().decode()}") from error


def ask(server: str, **parameters: object) -> int:
    """Status of one request."""
    body = json.dumps({"inputs": "In the beginning God created", "parameters": parameters}).encode()
    request = urllib.request.Request(f"{server}/generate", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def dashboard(server: str, prometheus: str) -> None:
    """Every query of every panel gives a series, once requests were answered and refused between two scrapes."""
    deadline = time.monotonic() + 60
    while True:
        try:
            targets = get(f"{prometheus}/api/v1/targets")["data"]["activeTargets"]
        except urllib.error.URLError:
            targets = []
        if targets and all(target["health"] == "up" for target in targets):
            break
        assert time.monotonic() < deadline, f"the server is not scraped: {targets}"
        time.sleep(0.2)
    # A rate needs two scrapes of a series that is there: it is brought into being, and then grows for two intervals.
    for _ in range(12):
        assert ask(server, max_new_tokens=16) == 200
        assert ask(server, max_new_tokens=-1) == 422
        time.sleep(1)
    panels = json.loads((CLONE / "assets" / "grafana.json").read_text())["panels"]
    num_queries, num_series = 0, 0
    for panel in panels:
        for target in panel.get("targets", []):
            query = target["expr"].replace("$instance", ".*").replace("$__rate_interval", "20s")
            result = get(f"{prometheus}/api/v1/query", query=query)["data"]["result"]
            assert result, f"{panel['title']}: no series for {query}"
            assert all(series["value"][1] != "NaN" for series in result), f"{panel['title']}: {result}"
            num_queries += 1
            num_series += len(result)
    print(f"compose: Prometheus answers all {num_queries} queries of the dashboard, with {num_series} series")


if __name__ == "__main__":
    {"files": files, "dashboard": dashboard}[sys.argv[1]](*sys.argv[2:])
