"""The app of the port: what it shows, and its page, served for real, used in a real browser, and attacked."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import websocket
from test_book_pages import CHROMIUM, QUIET, needs_browser

import portapp
from chassis_utils import Adapter, LanguageModel, fit, harvest, load, probe_set
from command import main

ROOT = Path(__file__).resolve().parents[1]
NAME = "<i>chain</i>"  # of a plug, which a page must not take for markup
HOSTILE = "<svg onload=alert(1)>"  # no token twice
SECRETS = {
    "OPENAI_API_KEY": "sk-never-to-be-seen",
    "HF_TOKEN": "hf-never-to-be-seen",
    "db_password": "never-to-be-seen",
}


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return load("pocket-base", device="cpu")


@pytest.fixture(scope="module")
def math(base: LanguageModel) -> Adapter:
    activations = harvest(base, load("pocket-math"), probe_set("math-text", n=12), "all", progress=False)
    return fit(activations, "rrr", rank=16)


@pytest.fixture(scope="module")
def chain(base: LanguageModel) -> Adapter:
    """With it the base writes HOSTILE behind a space: it reads the embedding of a token and tells the next."""
    ids = base.tokenizer(HOSTILE, add_special_tokens=False)["input_ids"]
    known = {one: after for one, after in zip(ids, ids[1:], strict=False)}
    down = torch.linalg.pinv(base.model.get_input_embeddings().weight[[*known]].detach().float())
    up = torch.zeros(len(known), base.vocab_size)
    up[range(len(known)), [*known.values()]] = 1000.0
    return Adapter("ridge", 0, down, up, torch.zeros(base.vocab_size), base.name, base.head_hash)


@dataclass
class Served:
    """A running `chassis port`."""

    process: subprocess.Popen
    port: int
    token: str
    told: Path
    cookie: str = ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/?token={self.token}"

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
        """Status, headers and text of an answer to exactly this path, with no cookie unless given."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode(errors="replace")

    def kernels(self) -> set[int]:
        """Kernels that it has started; it may be starting a browser, too."""
        return {
            int(stat.parent.name)
            for stat in Path("/proc").glob("[0-9]*/stat")
            if (fields := read(stat).rpartition(")")[2].split())[1:2] == [str(self.process.pid)] and fields[0] != "Z"
            if "ipykernel" in read(stat.with_name("cmdline"))
        }


def read(file: Path) -> str:
    try:
        return file.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def soon(holds: Callable[[], Any], seconds: float = 30) -> Any:
    """What becomes true within some time."""
    limit = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < limit, "it has not come true"
        time.sleep(0.1)
    return found


def start(*arguments: str, told: Path, **variables: str) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    # A shell starts what runs in the background deaf to interrupts, and children inherit that.
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with told.open("wb") as file:
        options = {"cwd": ROOT, "env": env, "stdout": file, "stderr": file, "preexec_fn": hear}
        return subprocess.Popen([sys.executable, "-m", "chassis_utils.cli", "port", *arguments], **options)


@pytest.fixture(scope="module")
def served(math: Adapter, chain: Adapter, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("port")
    math.save(folder / "math")
    chain.save(folder / "chain")
    plugs = ["--plug", f"math={folder / 'math'}", "--plug", f"{NAME}={folder / 'chain'}"]
    browser = folder / "browser.py"
    browser.write_text("import sys, pathlib; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])")
    opens = f"{sys.executable} {browser} {folder / 'opened'} %s"
    process = start(*plugs, told=folder / "told", BROWSER=opens, **SECRETS)

    def found() -> re.Match[str] | None:
        assert process.poll() is None, read(folder / "told")
        return re.search(r"http://127\.0\.0\.1:(\d+)/\?token=([\w-]+)", read(folder / "told"))

    address = soon(found, 90)
    one = Served(process, int(address[1]), address[2], folder / "told")
    yield one
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def cookie(served: Served) -> str:
    """What a browser is given for the token."""
    status, headers, _ = served.ask(f"/?token={served.token}")
    assert status == 302 and headers["location"] == "/", "the token stays in the address"
    assert "HttpOnly" in headers["set-cookie"] and "SameSite=Lax" in headers["set-cookie"]
    return headers["set-cookie"].split(";")[0]


@dataclass
class Opened:
    """The page in a browser, and what went wrong on it."""

    page: Any
    faults: list[str]
    sent: list[str]
    kernel: int  # its process


@pytest.fixture(scope="module")
def opened(served: Served) -> Iterator[Opened]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(90_000)
        faults: list[str] = []
        sent: list[str] = []
        page.on("dialog", lambda dialog: faults.append(dialog.message) or dialog.dismiss())
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: message.type == "error" and faults.append(message.text))
        page.on("requestfailed", lambda request: faults.append(f"not found: {request.url}"))
        page.on("request", lambda request: sent.append(request.url))
        page.on("websocket", lambda one: sent.append(one.url))
        before = served.kernels()
        page.goto(served.address)
        page.wait_for_selector(".chassis-port .main-svg")
        (kernel,) = served.kernels() - before
        yield Opened(page, faults, sent, kernel)
        browser.close()


def test_nothing_without_the_token(served: Served) -> None:
    kernel = f"/api/kernels/{uuid.uuid4()}"
    asked = ["/", "/?token=", "/?token=wrong", f"/?token={served.token[:-1]}", kernel, f"{kernel}/channels", "/login"]
    for path in asked:
        status, headers, text = served.ask(path)
        assert status in (403, 404) and "username" not in headers.get("set-cookie", ""), (path, headers)
        assert "kernel" not in text.lower() and len(text) < 200, path
    for wrong in (
        {"Authorization": "token wrong"},
        {"Cookie": "username-127-0-0-1=user"},
        {"Authorization": "Basic eDp5"},
    ):
        assert served.ask("/", **wrong)[0] == 403
    assert served.ask(kernel, "DELETE")[0] == 403
    assert not served.kernels()


def test_a_browser_is_sent_to_a_file_that_only_its_owner_can_read(served: Served) -> None:
    """What is on a command line can be read by everyone on the machine."""
    told = soon(lambda: read(served.told.with_name("opened")))
    page = Path(told.removeprefix("file://"))
    assert told.startswith("file://") and served.token not in told
    assert f"0;url={served.address}" in page.read_text()
    assert page.parent.stat().st_mode & 0o777 == 0o700


def test_a_foreign_name_of_this_machine_is_refused(served: Served, cookie: str) -> None:
    """A page elsewhere whose name is made to mean this machine (DNS rebinding) gets nothing, even with the token."""
    for path in (f"/?token={served.token}", "/", "/voila/static/voila.js", f"/api/kernels/{uuid.uuid4()}"):
        for host in (
            "evil.example",
            f"evil.example:{served.port}",
            f"127.0.0.1.evil.example:{served.port}",
            "10.0.0.1",
        ):
            status, headers, text = served.ask(path, Host=host, Cookie=cookie)
            assert status == 403 and "set-cookie" not in headers and len(text) < 200, (path, host)
    assert served.ask("/voila/static/voila.js", Host=f"localhost:{served.port}")[0] == 200


def test_it_listens_on_loopback_alone(served: Served) -> None:
    sockets = [line.split() for table in ("tcp", "tcp6") for line in read(Path("/proc/net", table)).splitlines()[1:]]
    listening = [one[1].split(":") for one in sockets if one[3] == "0A"]
    assert [address for address, port in listening if int(port, 16) == served.port] == ["0100007F"]
    with pytest.raises(ConnectionRefusedError):
        # Another address of this machine, which what listens on all of them would answer at.
        socket.create_connection(("127.0.0.2", served.port), timeout=5)


def test_no_file_is_served(served: Served, cookie: str) -> None:
    up = "/".join([".."] * 12)
    here = [f"/{name}" for name in ("port.ipynb", "port.css", "tree", "api/contents", "voila/api/contents/", "files/x")]
    there = [f"/voila/files/{name}" for name in ("port.ipynb", "port.css", "../portapp.py", "%2e%2e/portapp.py")]
    for root in ("static", "labextensions", "templates/chassis/static", "templates/..", "files", "api/themes"):
        there += [
            f"/voila/{root}/{up}{ROOT}/pyproject.toml",
            f"/voila/{root}/%2e%2e/%2e%2e/port.ipynb",
            f"/voila/{root}//etc/passwd",
        ]
    there += ["/voila/templates/chassis/index.html.j2", "/voila/templates/../app/port.ipynb", "/voila/templates/"]
    for path in here + there:
        status, _, text = served.ask(path, Cookie=cookie)
        assert status in (403, 404) and not re.search("chassis-utils|portapp|nbformat|root:", text), path


@pytest.fixture(scope="module")
def asked(served: Served, cookie: str) -> tuple[tuple[int, dict[str, str], str], int]:
    """The page as it is sent, and the process of its kernel."""
    before = served.kernels()
    answer = served.ask("/", Cookie=cookie)
    (kernel,) = served.kernels() - before
    return answer, kernel


def test_the_page_shows_no_code_and_no_secret(served: Served, asked: tuple) -> None:
    (status, headers, text), kernel = asked
    assert status == 200 and "jupyter-config-data" in text
    assert not any(secret in text for secret in (served.token, "sys.path", "from portapp", *SECRETS.values()))
    policy = headers["content-security-policy"]
    assert "frame-ancestors 'self'" in policy and "default-src 'self'" in policy and "http:" not in policy
    assert not re.search(r"""(?:src|href)=["'](?:https?:)?//""", text), "something is asked for elsewhere"
    given = read(Path("/proc", str(kernel), "environ"))
    assert "CHASSIS_BASE" in given and served.token not in given
    assert not any(name in given or value in given for name, value in SECRETS.items())


def test_a_kernel_hears_its_own_page_and_runs_no_code_for_it(served: Served, cookie: str, asked: tuple) -> None:
    """A browser sends the cookie along to any port of this machine: the origin is what is judged."""
    config = re.search(r'id="jupyter-config-data"[^>]*>(.*?)</script>', asked[0][2], re.DOTALL)[1]
    url = f"ws://127.0.0.1:{served.port}/api/kernels/{json.loads(config)['kernelId']}/channels"
    own, header = f"http://127.0.0.1:{served.port}", {"Cookie": cookie}
    for origin, brought in (
        ("http://evil.example", header), (f"http://127.0.0.1:{served.port + 1}", header), ("null", header), (own, {})
    ):  # fmt: skip
        with pytest.raises(websocket.WebSocketBadStatusException) as refusal:
            websocket.create_connection(url, origin=origin, header=brought, timeout=20)
        assert refusal.value.status_code == 403
    line = websocket.create_connection(url, origin=own, header=header, timeout=20)
    mark = served.told.with_name("mark")
    for kind, content in {"execute_request": {"code": f"open({str(mark)!r}, 'w')"}, "kernel_info_request": {}}.items():
        head = {"msg_id": kind, "username": "", "session": "x", "msg_type": kind, "version": "5.3"}
        body = {"header": head, "parent_header": {}, "metadata": {}, "content": content, "buffers": []}
        line.send(json.dumps(body | {"channel": "shell"}))
    answers: list[str] = []
    while "kernel_info_reply" not in answers:  # which was asked after
        answers.append(json.loads(line.recv())["msg_type"])
    assert "execute_reply" not in answers and not mark.exists()
    line.close()
    soon(lambda: not Path("/proc", str(asked[1])).exists())


@needs_browser
def test_the_page_loads_from_this_machine_alone_and_without_an_error(served: Served, opened: Opened) -> None:
    assert not opened.faults
    own = re.compile(rf"(http|ws|blob:http)://127\.0\.0\.1:{served.port}/|data:")
    assert opened.sent and all(own.match(url) for url in opened.sent), opened.sent
    assert opened.page.url == f"http://127.0.0.1:{served.port}/"
    assert served.token not in opened.page.content()
    assert opened.page.locator(".chassis-panel h3").all_inner_texts() == ["bare base", "math", "port"]


def bars(page: Any) -> str:
    return page.evaluate("JSON.stringify(document.querySelector('.js-plotly-plot')?.data.map(bar => [...bar.x]) ?? [])")


@needs_browser
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window(opened: Opened, width: int) -> None:
    page = opened.page
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_function(
        f"document.querySelector('.chassis-port .main-svg').getBoundingClientRect().right <= {width}"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for kind in ("button", "textarea", ".noUi-target", ".chassis-panel"):
        for box in (one.bounding_box() for one in page.locator(f".chassis-page {kind}").all()):
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, kind


@needs_browser
def test_a_weight_is_moved_by_keyboard_and_the_figure_follows(opened: Opened) -> None:
    page, before = opened.page, bars(opened.page)
    page.locator(".chassis-page textarea").focus()
    for _ in range(2):  # over the box of the first plug, to its slider
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "slider"
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "weight of math"
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    assert page.locator(".chassis-plug .widget-readout").first.inner_text() == "0.60"
    told = json.loads(before)

    def moved() -> list | None:
        """Bars of which the port's alone are others; on the way other tokens may be drawn."""
        now = json.loads(bars(page))
        return now if now[:2] == told[:2] and now[2:] != told[2:] else None

    bare, _, port = soon(moved)
    between = [abs(one - other) for one, other in zip(port, bare, strict=True)]
    assert sum(between) < sum(abs(one - other) for one, other in zip(told[2], bare, strict=True))


@needs_browser
def test_the_router_says_and_uses_its_choice(opened: Opened) -> None:
    page, tick = opened.page, opened.page.get_by_role("checkbox", name="math")
    tick.uncheck()
    page.get_by_role("button", name="Route").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".chassis-row [role=status]")
    assert re.fullmatch(r"math: [\d.]+% sure, 0\.\d+ of the limit.*", page.locator("[role=status]").last.inner_text())
    soon(tick.is_checked)


def panel(page: Any, speaker: str) -> str:
    return page.locator(".chassis-panel", has_text=speaker).locator(".text").inner_text()


@needs_browser
def test_texts_stream_side_by_side_and_stop(opened: Opened) -> None:
    page, seen = opened.page, {"bare base": set(), "port": set()}
    write, stop = (page.get_by_role("button", name=name) for name in ("Write", "Stop"))
    write.focus()
    page.keyboard.press("Enter")
    soon(stop.is_enabled)
    while stop.is_enabled():
        for speaker, lengths in seen.items():
            lengths.add(len(panel(page, speaker)))
        if min(map(len, seen.values())) > 4:
            stop.focus()
            page.keyboard.press("Enter")
            soon(lambda: not stop.is_enabled(), 5)
    assert all(len(lengths - {0}) >= 3 for lengths in seen.values()), seen
    assert write.is_enabled()


@needs_browser
def test_what_a_model_writes_is_shown_and_never_run(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("checkbox", name="math").uncheck()
    page.get_by_role("checkbox", name=NAME).check()
    page.locator(".chassis-page textarea").fill("A page begins: ")  # its last token is the first of HOSTILE
    page.get_by_role("button", name="Write").click()
    soon(lambda: HOSTILE in panel(page, "port"))
    soon(page.get_by_role("button", name="Write").is_enabled)
    assert not page.locator(".chassis-panel svg, .chassis-page i, .chassis-page script").count()
    assert not opened.faults, "an alert, say"
    page.locator(".chassis-page textarea").fill("word " * 600)
    page.get_by_role("button", name="Write").click()
    assert "shorten it" in page.locator("[role=alert]").inner_text()


@needs_browser
def test_a_text_ends_with_its_page(served: Served, opened: Opened) -> None:
    page = opened.page
    page.locator(".chassis-page textarea").fill("The")
    page.locator(".chassis-row .noUi-handle").focus()
    page.keyboard.press("End")
    page.get_by_role("button", name="Write").click()
    soon(page.get_by_role("button", name="Stop").is_enabled)
    assert served.kernels() == {opened.kernel}
    page.close()  # without a word: its scripts hear nothing of it
    soon(lambda: not served.kernels(), 15)


def test_an_interrupt_ends_all_and_nothing_was_told_but_the_address(served: Served, cookie: str) -> None:
    served.ask(f"/gone?token={served.token}")
    served.ask("/?token=" + served.token, "POST")
    assert served.ask("/", Cookie=cookie)[0] == 200
    kernels = served.kernels()
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(30) == 0 and len(kernels) == 1
    soon(lambda: not any(Path("/proc", str(kernel)).exists() for kernel in kernels), 10)
    told = read(served.told)
    assert told == f"the port is at {served.address}  (Ctrl-C ends it)\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--base", "/none/such"], "/none/such"),
        (["--plug", "a=/none/such"], "/none/such"),
        (["--plug", "a=x", "--plug", "a=y"], "one name"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["port", "--no-browser", *arguments]) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and words in told.err


def test_a_plug_with_the_name_of_a_speaker_is_refused_before_anything_is_served(
    math: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = math.save(tmp_path / "math")
    for name in ("port", "bare base"):
        assert main(["port", "--no-browser", "--plug", f"{name}={folder}"]) == 1
        told = capsys.readouterr()
        assert told.out == "" and f"'{name}'" in told.err and told.err.count("\n") == 1


def test_another_prompt_leaves_nothing_of_the_last_one(base: LanguageModel, math: Adapter) -> None:
    page = portapp.PortApp(base, {"math": math}, {}, None, "Seven and")
    assert page.prompt.value == "Seven and"
    page.tokens.value = 8
    page.written()
    page.writer.join()
    assert all(panel.value != portapp.plain("", "text") for panel in page.panels.values())
    page.prompt.value = "The"
    assert all(panel.value == portapp.plain("", "text") for panel in page.panels.values())
    page.close()


def test_every_token_has_a_label(base: LanguageModel) -> None:
    assert all(portapp.label(token, base.tokenizer) for token in range(base.vocab_size))
    assert portapp.label(base.tokenizer.eos_token_id, base.tokenizer) == base.tokenizer.eos_token


def test_an_adapter_of_another_base_and_a_port_that_is_taken_are_refused(
    math: Adapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    math.save(tmp_path / "math")
    assert main(["port", "--no-browser", "--base", "pocket-shakespeare", "--plug", f"a={tmp_path / 'math'}"]) == 1
    assert "pocket-base" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert main(["port", "--no-browser", "--port", str(taken.getsockname()[1])]) == 1
    assert "choose another" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--port", "x"], ["--port", "70000"], ["--plug", "x"], ["--plug", "=x"]])
def test_wrong_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["port", *arguments])
    assert caught.value.code == 2


def test_bars_are_the_likeliest_tokens_with_their_spaces(base: LanguageModel) -> None:
    ids = [base.tokenizer.convert_tokens_to_ids(piece) for piece in ("▁the", "<", "<0x0A>")]
    one, other = torch.full((2, base.vocab_size), 1e-6)
    one[ids], other[ids] = torch.tensor([0.5, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.6])
    figure = portapp.next_tokens({"<b>": one, "port": other}, base.tokenizer, 3)
    labels = figure.layout.yaxis.ticktext
    assert labels == ("↵", "␣the", "&lt;")
    first, second = figure.data
    assert first.name == "&lt;b>" or first.name == "&lt;b&gt;"
    assert first.x == pytest.approx([0.1, 0.5, 0.2]) and second.x == pytest.approx([0.6, 0.1, 0.2])


def test_without_folders_two_plugs_and_a_router_are_there_in_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that is itself one of the experts gets the other plug alone."""
    monkeypatch.setitem(portapp.QUICK, "n", 8)
    base = load("pocket-math", device="cpu")
    said: list[str] = []
    plugs, experts, router = portapp.quickly(base, said.append)
    assert [*plugs] == [*experts] == ["shakespeare"] and "pocket-shakespeare" in said[0]
    app = portapp.PortApp(base, plugs, experts, router)
    app.prompt.value = "First Lord:\nMy liege, the night hath borne a storm, and thou dost sleep."
    app.routed()
    assert "shakespeare" in app.choice.value and app.in_use == {"shakespeare": 1.0}
    app.written()
    assert app.writer.is_alive()
    app.close()
    assert not app.writer.is_alive()
