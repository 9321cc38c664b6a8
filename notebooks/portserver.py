"""The page of the port served to this machine alone: loopback, a token, and no route but those the page needs."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import signal
import subprocess
import threading
import webbrowser
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPServerRequest
from tornado.ioloop import IOLoop
from tornado.netutil import bind_sockets
from tornado.routing import AnyMatches, HostMatches
from tornado.web import ErrorHandler, HTTPError, authenticated
from traitlets.config import Config

import chassis_utils
from chassis_utils import ChassisError, Port, load
from portapp import check_names

try:
    from voila.app import Voila
    from voila.tornado.handler import TornadoVoilaHandler
    from voila.tornado.kernel_websocket_handler import VoilaKernelWebsocketHandler
except ImportError:
    raise ChassisError("Voilà, which serves the page, is missing: pip install 'chassis-utils[lab]'") from None

APP = Path(__file__).resolve().with_name("app")
HOST = "127.0.0.1"
SECRET = re.compile("KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
GONE = 3  # seconds without a page after which its kernel is ended
# Nothing from elsewhere, whatever a page may ask for. Widgets and figures are made by scripts that write code.
POLICY = {
    "default-src": "'self'", "script-src": "'self' 'unsafe-inline' 'unsafe-eval'",
    "style-src": "'self' 'unsafe-inline'", "img-src": "'self' data: blob:",
    "font-src": "'self' data:", "connect-src": "'self' ws://{address}",
    "frame-ancestors": "'self'", "object-src": "'none'", "base-uri": "'none'", "form-action": "'none'",
}  # fmt: skip


def serve(base: str, plugs: Sequence[tuple[str, str]], number: int = 0, browser: bool = True) -> None:
    """Serve the page until Ctrl-C, SIGTERM or SIGHUP, which end all kernels too; its address is printed, with a token.

    ChassisError, before anything is served: the base or an adapter's folder cannot be loaded or do not fit, a name
    twice, or the port is taken.
    """
    try:
        folders = {name: str(Path(folder).resolve()) if Path(folder).exists() else folder for name, folder in plugs}
        base = str(Path(base).resolve()) if Path(base).is_dir() else base
    except OSError as error:
        raise ChassisError(f"a base or plug is no name of a folder ({error.strerror}): give another") from None
    if len(folders) < len(plugs):
        raise ChassisError("two plugs have one name: give each its own")
    check_names(folders)
    port = Port(load(base))
    for name, folder in folders.items():
        port.plug(name, folder)
    del port  # every page has a kernel that loads its own
    try:
        sockets = bind_sockets(number, HOST)
    except OSError as error:
        raise ChassisError(f"port {number} cannot be had ({error.strerror}): choose another, or 0") from None
    _environment(base, folders)
    token = secrets.token_urlsafe(32)
    server = Server.instance(config=_config(token, f"{HOST}:{sockets[0].getsockname()[1]}"))
    server.sockets, server.with_browser = sockets, browser
    server.initialize([])
    # They tell of a ping's time-out, which jupyter_server sets, and of messages to pages that have just gone.
    logging.getLogger("tornado.general").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGHUP, server._handle_signal_stop)  # a terminal that is closed
    server.start()


def _environment(base: str, folders: dict[str, str]) -> None:
    """What kernels are told and may see: no key, no token, and what was checked, without asking a network again."""
    for name in [name for name in os.environ if SECRET.search(name)]:
        del os.environ[name]
    paths = [str(APP.parent), str(Path(chassis_utils.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]
    os.environ |= {"CHASSIS_BASE": base, "CHASSIS_PLUGS": json.dumps(folders), "HF_HUB_OFFLINE": "1",
                   "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                   "JUPYTER_PATH": str(APP)}  # where the page's template lies  # fmt: skip


def _config(token: str, address: str) -> Config:
    policy = "; ".join(f"{name} {value.format(address=address)}" for name, value in POLICY.items())
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
    return Config({
        "Voila": {
            "config_file_paths": [], "notebook_path": str(APP / "port.ipynb"), "root_dir": str(APP), "ip": HOST,
            "token": token, "open_browser": False, "log_level": logging.ERROR,
            "tornado_settings": {"allow_remote_access": False, "headers": headers, "log_function": lambda _: None}},
        "VoilaConfiguration": {
            "template": "chassis", "allow_template_override": "NO", "allow_theme_override": "NO",
            "strip_sources": True, "show_tracebacks": False, "file_allowlist": [], "file_denylist": [".*"],
            "http_header_envs": [],
            "extension_allowlist": [
                "@voila-dashboards/widgets-manager8", "@jupyter-widgets/jupyterlab-manager", "jupyterlab-plotly"]},
        "IdentityProvider": {"cookie_options": {"expires_days": None, "samesite": "Lax"}},
        "KernelManager": {"transport": "ipc"},  # in a folder of the owner, not a socket that others can reach
        "MappingKernelManager": {"cull_idle_timeout": 60, "cull_interval": 10, "cull_connected": False},
    })  # fmt: skip


class Curt:
    """What is told when a request fails: a line, of no template."""

    def write_error(self, status_code: int, **_: Any) -> None:
        """Say what to do."""
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{status_code}: open the address that `chassis port` printed\n")


class Page(TornadoVoilaHandler):
    """The one page: for who brings the token, at an address that does not tell it again."""

    def get_login_url(self) -> str:
        """There is no form to log in by."""
        raise HTTPError(403)

    @authenticated
    async def get(self, path: str | None = None) -> None:
        """The page; with a query, which holds the token, the way to it without one."""
        if path:
            raise HTTPError(404)
        if self.request.query:
            return self.redirect(self.base_url)  # the cookie is set: neither history nor kernel sees the token
        await super().get()


class Channels(VoilaKernelWebsocketHandler):
    """A page's way to its kernel, which ends when the page has gone, whatever it was writing."""

    def on_close(self) -> None:
        """Wait a little, as a page may come back, then end the kernel."""
        super().on_close()
        IOLoop.current().call_later(GONE, self._end, self.kernel_id, self.kernel_manager)

    @staticmethod
    async def _end(kernel: str, manager: Any) -> None:
        if kernel in manager and not manager.kernel_model(kernel)["connections"]:
            await manager.shutdown_kernel(kernel, now=True)


class Here(HostMatches):
    """Requests to this machine by its own name, for nothing above where they begin."""

    def match(self, request: HTTPServerRequest) -> dict[str, Any] | None:
        """None for a foreign name, as of a page that made its name mean this machine, and for paths that climb."""
        return None if ".." in unquote(request.path) else super().match(request)


class Server(Voila):
    """Voilà with the routes that the page needs, for requests to this machine by its own name, and no others."""

    sockets: list
    with_browser: bool

    def init_handlers(self) -> list:
        """Of Voilà's routes: kernels, what pages are made of, and the page."""
        kept = {"KernelHandler": None, "VoilaKernelWebsocketHandler": Channels, "TemplateStaticFileHandler": None,
                "MultiStaticFileHandler": None, "FileFindHandler": None, "TornadoVoilaHandler": Page}  # fmt: skip
        routes = []
        for path, handler, *more in super().init_handlers():
            if (name := handler.__name__) in kept:
                path = path.replace("templates/(.*)", r"templates/(chassis/static/.+)")
                routes.append((path, type(name, (Curt, kept[name] or handler), {}), *more))
        return [(Here(rf"^({re.escape(HOST)}|localhost)$"), routes), (AnyMatches(), ErrorHandler, {"status_code": 403})]

    def listen(self) -> None:
        """Say where the page is, and serve it until the end."""
        token, address = self.token, f"http://{HOST}:{self.sockets[0].getsockname()[1]}/"
        for handler in (*self.log.handlers, *logging.getLogger().handlers, logging.lastResort):
            handler.addFilter(lambda record: _without(record, token))
        os.environ["CHASSIS_KEPT"] = self.connection_dir  # what one page has fitted, until the end
        # A kernel that ends in the middle of an import has its last word, which is for nobody.
        self.kernel_manager.start_kernel = partial(self.kernel_manager.start_kernel, stderr=subprocess.DEVNULL)
        HTTPServer(self.app).add_sockets(self.sockets)
        print(f"the port is at {address}?token={token}  (Ctrl-C ends it)", flush=True)
        if self.with_browser:
            # A browser's command line can be read by everyone on the machine, this file by its owner alone.
            page = Path(self.connection_dir, "open.html")
            page.write_text(f'<meta http-equiv="refresh" content="0;url={address}?token={token}">', encoding="utf-8")
            threading.Thread(target=webbrowser.open, args=(page.as_uri(),), daemon=True).start()
        self.ioloop = IOLoop.current()
        try:
            self.ioloop.start()
        except KeyboardInterrupt:
            pass
        finally:
            self.stop()


def _without(record: logging.LogRecord, token: str) -> bool:
    """A line of a log with the token left out, should a request that holds it fail."""
    record.msg, record.args = record.getMessage().replace(token, "[token]"), ()
    return True
