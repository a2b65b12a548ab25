"""Makes .ci/page.png, the README's picture of the live page: a relay in front of scripts that stand for providers, with
two days of invented traffic in its ledger and more of it coming, as Chromium shows it to the owner. The environment is
that of the tests, with Debian's chromium and chromium-driver:

    .venv/3.*/bin/python .ci/picture.py
"""

import base64
import contextlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
sys.dont_write_bytecode = True

import monorelay  # noqa: E402
import test_monorelay as tests  # noqa: E402

SIZE = (1440, 830)
LIVE_SECONDS = 25.0  # until the picture is taken
AT_ONCE = 7  # requests at a time
PRICES = {
    "claude-opus-*": {"input": 5, "output": 25},
    "claude-haiku-*": {"input": 1, "output": 5},
    "gpt-5*": {"input": 1.25, "cache_read": 0.125, "output": 10},
    "llama*": {"input": 0, "output": 0},
}
MODELS = {  # by the name asked for: as sent, provider, keys, how often, prompt's tokens from a cache
    "smart": ("claude-opus-4-5", "anthropic", ("team", "team", "spare"), 9, 60_000),
    "fast": ("claude-haiku-4-5", "anthropic", ("team", "spare"), 7, 9_000),
    "gpt-5": ("gpt-5", "openai", ("main",), 4, 11_000),
    "llama3.3": ("llama3.3", "local", ("",), 2, 0),
}
USERS = {"alice": 9, "bob": 6, "carol": 3, "ci": 2}
KEYS = {user: f"key-of-{user}-for-the-picture" for user in USERS}
LIMITS = {
    "sk-team": [
        "anthropic-ratelimit-input-tokens-limit: 2000000",
        "anthropic-ratelimit-input-tokens-remaining: 1580000",
    ],
    "sk-spare": ["anthropic-ratelimit-unified-5h-utilization: 0.97"],
    "sk-main": [
        "x-ratelimit-limit-tokens: 2000000",
        "x-ratelimit-remaining-tokens: 960000",
        "x-ratelimit-reset-tokens: 9s",
    ],
}
chance = random.Random(7)


def choice(weights):
    return chance.choices(list(weights), list(weights.values()))[0]


def choose_model():
    return choice({asked: model[3] for asked, model in MODELS.items()})


def invented_rows(config, count, now):
    """Requests of the last two days, more by day than by night."""
    for _ in range(count):
        age = chance.random() * 47 * 3600
        if chance.random() > 0.25 + 0.75 * abs(((now - age) / 86400) % 1 - 0.15):
            continue
        asked = choose_model()
        sent, provider, keys, _, cached = MODELS[asked]
        fails = chance.random() < 0.012
        used = monorelay.Used(chance.randint(20, 900), int(cached * chance.uniform(0.3, 2)),
                              cached // chance.randint(20, 60), 0, chance.randint(30, 1500))  # fmt: skip
        kinds = dict(zip(monorelay.KINDS, [None] * 5 if fails else used))
        ttfb = int(chance.gammavariate(3, 320))
        yield tests.row(
            at=int((now - age) * 1000), request=monorelay.new_request_id(), user=choice(USERS), model=asked, sent=sent,
            provider=provider, key=chance.choice(keys), status=529 if fails else 200, ttfb=ttfb,
            error="upstream:overloaded_error" if fails else None, duration=ttfb + (kinds["output"] or 9) * 14,
            cost=None if fails else monorelay.cost_of(config.prices, config.providers[provider], sent, used), **kinds,
        )  # fmt: skip


def provider_script(connection):
    """Streams answers of some seconds; now and then it is overloaded."""
    while True:
        asked = connection.read_request()
        key = (asked.get("x-api-key") or asked.get("authorization") or "").split(" ")[-1]
        limits = [*LIMITS.get(key, []), f"anthropic-ratelimit-unified-5h-reset: {int(time.time()) + 4700}"]
        limits.append(f"anthropic-ratelimit-input-tokens-reset: {monorelay.utc_time(int(time.time()) + 60)}Z")
        time.sleep(chance.gammavariate(3, 0.3))
        if (key == "sk-spare" and chance.random() < 0.3) or chance.random() < 0.02:
            error = {"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}}
            connection.send(tests.answer(429, json.dumps(error).encode(), "retry-after: 40", *limits))
            continue
        head = ["HTTP/1.1 200 OK", "content-type: text/event-stream", "transfer-encoding: chunked", *limits, "", ""]
        connection.send("\r\n".join(head).encode())
        cached = next(model[4] for model in MODELS.values() if model[0] == asked.json["model"])
        output, is_chat = chance.randint(120, 1500), asked.target.endswith("completions")
        usage = {"input_tokens": chance.randint(20, 900), "cache_read_input_tokens": cached,
                 "cache_creation_input_tokens": cached // 40, "output_tokens": output}  # fmt: skip
        if is_chat:
            usage = {"prompt_tokens": 400 + cached, "prompt_tokens_details": {"cached_tokens": cached},
                     "completion_tokens": output}  # fmt: skip
        for _ in range(output // 12):
            connection.send(tests.chunk(b'data: {"type": "content_block_delta", "text": "' + b"word " * 12 + b'"}\n\n'))
            time.sleep(0.1)
        last = [tests.sse("message_delta", usage=usage), tests.sse("message_stop")]
        if is_chat:
            last = [b"data: %s\n\n" % json.dumps({"choices": [], "usage": usage}).encode(), b"data: [DONE]\n\n"]
        connection.send(tests.chunked(*last))


def visit(relay, over):
    """Asks for one model after the other, as one user after the other."""
    while not over.is_set():
        asked = choose_model()
        path = "/v1/messages" if MODELS[asked][1] == "anthropic" else "/v1/chat/completions"
        with contextlib.suppress(EOFError), relay.client() as client:
            client.sock.settimeout(120)
            client.ask("POST", path, json.dumps(tests.prompt(asked, stream=True)).encode(), token=KEYS[choice(USERS)])


def described(folder):
    """The providers, by their upstreams, and the other sections of relay.json."""
    made = {name: tests.Upstream(provider_script) for name in ("anthropic", "openai", "local")}
    providers = {
        "anthropic": {
            "upstream": made["anthropic"], "keys": [{"key": f"sk-{it}", "label": it} for it in ("team", "spare")],
        },
        "openai": {"upstream": made["openai"], "keys": [{"key": "sk-main", "label": "main"}]},
        "local": {"upstream": made["local"], "format": "openai", "keys": [{"key": "sk-none", "label": "gpu"}]},
    }  # fmt: skip
    users = {user: {"key": key} for user, key in KEYS.items()}
    users["alice"] |= {"usd_per_day": 40, "usd_per_month": 300}
    users["bob"] |= {"usd_per_month": 60}
    users["carol"] |= {"tokens_per_day": 5_000_000}
    aliases = {asked: f"{model[0]}@{model[1]}" for asked, model in MODELS.items() if asked != model[0]}
    routes = {"gpt-*": "openai", "llama*": "local", "claude-*": "anthropic"}
    ledger = {"path": str(folder / "usage.db")}
    return providers, {"users": users, "aliases": aliases, "routes": routes, "ledger": ledger, "prices": PRICES}


def main():
    with tempfile.TemporaryDirectory() as name:
        folder, over = Path(name), threading.Event()
        providers, sections = described(folder)
        config = tests.parse(providers, **sections)
        rows = sorted(invented_rows(config, 9000, time.time()), key=lambda it: it.at)
        for start in range(0, len(rows), 500):
            monorelay.write_ledger(config.ledger, rows[start : start + 500], (), time.time())
        relay = tests.Relay(providers, **sections)
        for _ in range(AT_ONCE):
            threading.Thread(target=visit, args=(relay, over), daemon=True).start()
        browser = tests.Browser(folder / "profile")
        browser.size(*SIZE)
        browser.prefer(prefers_color_scheme="light")
        browser.show(relay, query="?days=7")
        time.sleep(LIVE_SECONDS)
        browser.settle()
        (HERE / "page.png").write_bytes(base64.b64decode(browser.driver.get_screenshot_as_base64()))
        browser.driver.quit()
        over.set()
        relay.server.stop()
        os._exit(0)


main()
