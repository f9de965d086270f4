"""Figures from a dcgm-exporter: its text, a server of it on this machine, and the sampler's process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from hybridpar.errors import ConfigError
from hybridpar.monitor import dcgm
from hybridpar.monitor.dcgm import Dcgm, Exporter, parse
from hybridpar.monitor.sampler import start
from hybridpar.monitor.settings import Options
from hybridpar.monitor.source import Refused
from tests.support.monitoring import UUIDS, gaps, record, samples, wait_for

ABOUT = 'gpu="1",UUID="{uuid}",pci_bus_id="00000000:3B:00.0",device="nvidia1",modelName="Tesla V100",Hostname="a"'
METRICS = {
    "DCGM_FI_DEV_GPU_UTIL": "37",
    "DCGM_FI_DEV_MEM_COPY_UTIL": "12",
    "DCGM_FI_PROF_GR_ENGINE_ACTIVE": "0.5",
    "DCGM_FI_PROF_SM_ACTIVE": "0.4",
    "DCGM_FI_PROF_SM_OCCUPANCY": "0.125",
    "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": "0.25",
    "DCGM_FI_PROF_DRAM_ACTIVE": "NaN",
    "DCGM_FI_DEV_SM_CLOCK": "1380",
    "DCGM_FI_DEV_MEM_CLOCK": "877",
    "DCGM_FI_DEV_GPU_TEMP": "44",
    "DCGM_FI_DEV_POWER_USAGE": "61.5",
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": "2500000",
    "DCGM_FI_DEV_FB_USED": "1000",
    "DCGM_FI_DEV_FB_FREE": "14000",
    "DCGM_FI_DEV_FB_RESERVED": "1384",
    "DCGM_FI_DEV_CLOCK_THROTTLE_REASONS": "33",
    "DCGM_FI_PROF_PCIE_TX_BYTES": "1.5e+06",
    "DCGM_FI_PROF_PCIE_RX_BYTES": "2500000",
    "DCGM_FI_DEV_XID_ERRORS": "0",
}
FIGURES = {
    "utilisation": 0.37,
    "memory_utilisation": 0.12,
    "graphics_activity": 0.5,
    "sm_activity": 0.4,
    "occupancy": 0.125,
    "tensor_activity": 0.25,
    "sm_clock_hz": 1.38e9,
    "memory_clock_hz": 877e6,
    "temperature_c": 44.0,
    "power_w": 61.5,
    "energy_j": 2500.0,
    "memory_used_bytes": 1000 * 2**20,
    "memory_total_bytes": 16384 * 2**20,
    "pcie_sent_bytes_per_s": 1.5e6,
    "pcie_received_bytes_per_s": 2.5e6,
}


def text(uuid: str = UUIDS[1], more: str = "") -> str:
    about = ABOUT.format(uuid=uuid) + more
    lines = [f"# HELP {name} Told.\n# TYPE {name} gauge\n{name}{{{about}}} {v}" for name, v in METRICS.items()]
    return "\n".join(lines) + "\n"


class Server:
    """A web server on this machine that says what it is told to, and counts how often."""

    def __init__(self) -> None:
        self.text, self.status, self.asked = text(), 200, 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                server.asked += 1
                body = server.text.encode()
                self.send_response(server.status if self.path == "/metrics" else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Print nothing."""

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/metrics"
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()


@pytest.fixture
def server() -> Iterator[Server]:
    result = Server()
    yield result
    result.http.shutdown()
    result.thread.join()
    result.http.server_close()


def test_figures_in_their_units() -> None:
    slice_of_it = text(UUIDS[0], ',GPU_I_PROFILE="1g.10gb",GPU_I_ID="7"')
    found = parse(text() + slice_of_it + 'DCGM_FI_DEV_GPU_UTIL{broken\nother_metric{UUID="x"} 1\n')
    assert set(found) == {(UUIDS[1], None), (UUIDS[0], "7")}
    assert found[UUIDS[1], None].pop("throttle") == ("thermal",)
    assert found[UUIDS[1], None] == pytest.approx(FIGURES)


def test_an_exporter_is_asked_seldom_however_often_it_is_read(server: Server) -> None:
    now_s = 100.0
    exporter = Exporter(server.url, lambda: now_s)
    meters = [Dcgm(exporter, (UUIDS[1], None)), Dcgm(exporter, (UUIDS[1], None)), Dcgm(exporter, ("GPU-x", None))]
    fresh = 0
    for tick in range(20):
        first, second = (meter.read(float(tick)) for meter in meters[:2])
        assert bool(first) == bool(second)
        fresh += bool(first)
        with pytest.raises(Refused, match="tells nothing of it"):
            meters[2].read(float(tick))
        now_s += 0.5
    assert (fresh, server.asked) == (2, 2)


@pytest.mark.parametrize(
    ("fault", "message"), [("status", "it answers 503"), ("size", "takes more than"), ("gone", "refused|reset")]
)
def test_an_exporter_that_fails_is_left_alone_for_a_while(
    fault: str, message: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 100.0
    url = server.url
    if fault == "status":
        server.status = 503
    elif fault == "size":
        monkeypatch.setattr(dcgm, "MOST_BYTES", 1000)
    else:
        url = "http://127.0.0.1:1/metrics"
    meter = Dcgm(Exporter(url, lambda: now_s), (UUIDS[1], None))
    for tick in range(20):
        with pytest.raises(Refused, match=message):
            meter.read(float(tick))
        now_s += 0.5
    assert server.asked == (0 if fault == "gone" else 1)
    server.status = 200
    monkeypatch.undo()
    now_s += dcgm.RETRY_AFTER_S
    if fault != "gone":
        assert meter.read(99.0)["power_w"] == 61.5


def test_a_server_that_says_nothing_holds_nobody_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcgm, "TIMEOUT_S", 0.05)
    silent = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # it listens, and nobody serves
    try:
        with pytest.raises(Refused, match="timed out"):
            Dcgm(Exporter(f"http://127.0.0.1:{silent.server_port}/metrics"), ("GPU-x", None)).read(1.0)
    finally:
        silent.server_close()


@pytest.mark.usefixtures("nvml")
def test_an_exporter_tells_what_nvml_does_not_know(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    ticks = record(path, 2, UUIDS[:2], Options(interval_s=0.12, dcgm=server.url))
    hopper, older = next(tick for tick in ticks if tick[1].occupancy is not None)
    assert (older.occupancy, older.occupancy_while_busy, older.utilisation) == (0.125, 0.25, 0.4)
    assert {older.sources[name] for name in ("occupancy", "occupancy_while_busy", "tensor_activity")} == {"dcgm"}
    assert older.sources["utilisation"] == older.sources["power_w"] == "nvml"
    assert "dcgm" not in hopper.sources.values()


@pytest.mark.usefixtures("no_driver")
def test_without_nvml_an_exporter_does(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    (sample, *_) = record(path, 1, UUIDS[1:2], Options(interval_s=0.12, dcgm=server.url))[0]
    wait_for(lambda: any(s.power_w for s in samples(path)) or len(samples(path)) > 2)
    assert sample.uuid == UUIDS[1]
    assert set(sample.sources.values()) == {"dcgm"}
    assert gaps(path) == ["no NVIDIA driver: NVML library not found"]


@pytest.mark.usefixtures("no_driver")
@pytest.mark.parametrize(("port", "part"), [(1, "no dcgm-exporter at"), (None, "knows none of the GPUs")])
def test_neither_nvml_nor_exporter_is_one_reason(
    port: int | None, part: str, server: Server, tmp_path: Path
) -> None:
    url = server.url if port is None else f"http://127.0.0.1:{port}/metrics"
    with start(tmp_path / "m.jsonl", Options(dcgm=url), uuids=["GPU-elsewhere"]) as monitor:
        assert "no NVIDIA driver" in (monitor.reason or "")
        assert part in (monitor.reason or "")


@pytest.mark.parametrize("url", ["localhost:9400", "https://a/metrics", "http://", "http://a:b/"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"monitor\.dcgm: .* must be an address like"):
        Options(dcgm=url)
