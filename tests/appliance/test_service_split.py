"""The OpenRC service as two processes, web server and worker, in a box of 256 MB; both hang."""

from pathlib import Path

import pytest

from tests.appliance.box import Layer
from tests.appliance.shop import SOON, opened
from tests.waiting import BULK_S, until

pytestmark = pytest.mark.appliance


def test_hung_processes_are_replaced_also_when_split(tmp_path: Path, layer: Layer) -> None:
    split = ('crmbridge_processes="split"', *SOON)
    with opened(tmp_path, layer, memory_mb=256, conf_d=split, delivery__stop_grace_s="0") as shop:
        web, worker = shop.pid("crmbridge serve --no-worker"), shop.pid("crmbridge worker")
        assert shop.customer_says("split") == 200
        until(lambda: "split" in shop.at_crm())
        assert shop.rc("status").count("status: started") == 2
        shop.box.run("kill", "-STOP", str(web), str(worker))
        until(
            lambda: web not in shop.pids("crmbridge serve") and worker not in shop.pids("crmbridge worker"),
            timeout_s=BULK_S,
        )
        shop.wait_healthy()
        assert shop.log().count(" error service.hung ") == 2
        until(lambda: shop.pids("crmbridge worker"))
        before = {shop.pid("crmbridge serve"), shop.pid("crmbridge worker")}
        for command in ("restart", "reload"):
            shop.rc(command)
            after = {shop.pid("crmbridge serve"), shop.pid("crmbridge worker")}
            assert not before & after
            before = after
        shop.rc("stop")
        assert not shop.pids("crmbridge serve") + shop.pids("crmbridge worker")
        assert shop.box.run("rc-service", "crmbridge", "status", check=False).returncode == 3
        conf_d = shop.box.root / "etc" / "conf.d" / "crmbridge"
        conf_d.write_text(conf_d.read_text().replace('crmbridge_processes="split"', ""))
        assert "works in one process" in shop.rc("start", service="crmbridge.worker", check=False)
        shop.rc("start")
        shop.wait_healthy()
        assert not shop.pids("crmbridge worker")
