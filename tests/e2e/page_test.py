"""The page at / in headless Chromium, driven by chromedriver over its own protocol (W3C WebDriver).

page_test.py PROGRAM. Exit code 77, which ctest shows as skipped, where Chromium or chromedriver is missing.
"""
import json
import os
import shutil
import subprocess
import sys
import time
import unittest
import urllib.error
import urllib.request

from served import PROMPT, Server

PROGRAM = sys.argv.pop(1)
PATIENCE = 60  # seconds; a page that hangs fails the test, slowness does not
ENTER = "\ue007"


class Browser:
    def __init__(self):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        self.session = None
        for line in self.driver.stdout:
            if "on port " in line and "successfully" in line:
                self.url = "http://127.0.0.1:" + line.split("on port ")[1].strip().rstrip(".")
                break
        arguments = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage"]
        if os.getuid() == 0:
            arguments.append("--no-sandbox")  # which Chromium demands of root
        created = self.call("POST", "/session", {"capabilities": {"alwaysMatch": {
            "browserName": "chrome", "goog:chromeOptions": {"args": arguments},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}}})
        self.session = "/session/" + created["sessionId"]

    def call(self, method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from None

    def go(self, url):
        self.call("POST", self.session + "/url", {"url": url})

    def run(self, script):
        return self.call("POST", self.session + "/execute/sync", {"script": script, "args": []})

    def type(self, selector, keys):
        found = self.call("POST", self.session + "/element",
                          {"using": "css selector", "value": selector})
        (element,) = found.values()
        self.call("POST", f"{self.session}/element/{element}/value", {"text": keys})

    def log(self, kind):
        return self.call("POST", self.session + "/se/log", {"type": kind})

    def close(self):
        if self.session:
            self.call("DELETE", self.session)
        self.driver.terminate()
        self.driver.wait()
        self.driver.stdout.close()


class PageTest(unittest.TestCase):
    def setUp(self):
        self.browser = Browser()
        self.addCleanup(self.browser.close)

    def serve(self, *flags):
        server = Server(PROGRAM, *flags)
        self.addCleanup(server.stop)
        self.browser.go(server.url + "/")
        return server

    def until(self, script, accept):
        end = time.monotonic() + PATIENCE
        while not accept(found := self.browser.run("return " + script)):
            self.assertLess(time.monotonic(), end, f"{script}: {found}")
            time.sleep(0.05)
        return found

    def text(self, selector):
        return f"[...document.querySelectorAll('{selector}')].map(one => one.textContent)"

    def ask(self, words):
        # Shift+Enter would begin a line; the prompt's lines are given by the script.
        self.browser.run(f"document.querySelector('#ask textarea').value = {json.dumps(words)}")
        self.browser.type("#ask textarea", ENTER)

    def test_a_conversation_and_what_the_cache_says(self):
        server = self.serve("--kv-cache-dtype", "fp8", "--kv-cache-dtype-skip-layers", "3")
        self.until(self.text("#model"), lambda found: found == ["needle"])
        self.assertEqual(self.browser.run("return document.title"), "Octavo")
        self.ask(PROMPT)
        self.until(self.text("#messages .message span"), lambda found: found == [PROMPT, "123456."])
        # Its gauges and the layers follow without a reload.
        self.until(self.text("#hits"), lambda found: found != ["-"])
        for gauge in "cache", "running", "waiting":
            self.assertRegex(self.browser.run(f"return at('{gauge}').textContent"), r"^[\d.]+( %)?$")
        layers = self.until(
            "[...at('layers').rows].map(row => [...row.cells].map(cell => cell.textContent))",
            lambda rows: len(rows) == 8 and rows[0][2] != "-")
        self.assertEqual([row[0] for row in layers],
                         [f"{layer} {operand}" for layer in range(4) for operand in "KV"])
        self.assertEqual({row[1] for row in layers[:6]}, {"fp8_e4m3"})
        self.assertEqual({row[1] for row in layers[6:]}, {"bf16"})
        self.assertEqual({row[4] for row in layers[:6]}, {"0"})
        self.ask("And again?")
        self.until(self.text("#messages .message"), lambda found: len(found) == 4)
        self.until("document.querySelector('#ask button').disabled", lambda found: not found)
        self.assertEqual(self.browser.run("return messages.length"), 4)
        # It complains of nothing, and has asked nobody else.
        self.assertEqual(self.browser.log("browser"), [])
        urls = set()
        for entry in self.browser.log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                urls.add(message["params"]["request"]["url"])
        own = {url for url in urls if url.startswith(server.url)}
        self.assertIn(server.url + "/metrics", own)
        self.assertEqual({url for url in urls - own if not url.startswith("data:")}, set())

    def test_the_key_opens_the_page(self):
        server = self.serve("--api-key", "se+/cr et")
        self.assertIn("open /?key=KEY", self.browser.run("return document.body.textContent"))
        self.browser.go(server.url + "/?key=se+%2Fcr%20et")
        self.until(self.text("#model"), lambda found: found == ["needle"])
        self.ask(PROMPT)
        self.until(self.text("#messages .message span"), lambda found: found == [PROMPT, "123456."])

    def test_little_room_is_used(self):
        self.serve("--max-model-len", "256")
        self.ask(PROMPT)
        self.until(self.text("#messages .message span"), lambda found: found == [PROMPT, "123456."])

    def test_an_error_is_shown(self):
        self.serve("--max-model-len", "128")
        self.ask("x" * 300)
        (words,) = self.until(self.text("#messages .error span"), lambda found: found)
        self.assertIn("max_model_len", words)
        self.assertFalse(self.browser.run("return document.querySelector('#ask button').disabled"))


if __name__ == "__main__":
    for program in "chromium", "chromedriver":
        if not shutil.which(program):
            print(f"SKIPPED: {program} is not installed (scripts/install-deps installs it)", file=sys.stderr)
            sys.exit(77)
    unittest.main()
