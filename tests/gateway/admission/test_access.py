"""Who passes the doors: every route and RPC, however it is spelled, over real sockets."""

from __future__ import annotations

import http.client
import json
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.config import GatewayConfig
from cluster.errors import Unauthorized
from cluster.messages import ModelCard
from gateway.admission.access import AccessPolicy
from gateway.admission.api_keys import digest
from gateway.grpc.authentication import peer_address
from gateway.grpc.proto import chat_pb2
from gateway.http.app import build_app
from gateway.http.authentication import PUBLIC_PATHS
from tests.gateway.doubles import ScriptedCoordinator, build_frontend, http_server, model_card, tokens_script
from tests.gateway.grpc.test_grpc import grpc_server
from tests.raw_http import send, spellings

KEY, METRICS_TOKEN = "manta-right", "token-of-prometheus"


def config(directory: Path, **fields: Any) -> GatewayConfig:
    keys, token = directory / "keys.json", directory / "token"
    keys.write_text(json.dumps([{"id": "alice", "sha256": digest(KEY)}, {"id": "bob", "sha256": digest("other")}]))
    token.write_text(METRICS_TOKEN + "\n")
    return GatewayConfig(api_keys_file=keys, metrics_token_file=token, **fields)


@pytest.fixture(scope="module")
def frontend(tmp_path_factory: pytest.TempPathFactory, tokenizer_directory: Path) -> Any:
    coordinator = ScriptedCoordinator(tokens_script([40, 41]))
    files = tmp_path_factory.mktemp("keys")
    return build_frontend(model_card(tokenizer_directory), coordinator, config(files, allowed_hosts=("manta.example",)))


def routes(app: Any) -> list[tuple[str, str]]:
    """Every (method, path) that needs a key."""
    found = [
        (method, route.path.replace("{name:path}", "tiny"))
        for route in app.routes
        for method in sorted(route.methods - {"HEAD"})
    ]
    return [(method, path) for method, path in found if path not in PUBLIC_PATHS]


def test_every_route_needs_a_key_however_it_is_spelled(frontend: Any, url: str) -> None:
    app = build_app(frontend)
    assert {path for _, path in routes(app)} >= {"/v1/chat/completions", "/v1/models", "/version", "/openapi.json"}
    for method, path in [*routes(app), ("GET", "/metrics"), ("GET", "/no/such/route"), ("POST", "/health")]:
        for spelling in spellings(path):
            for key in (None, "wrong", "", digest(KEY)):
                status, body, challenge = send(url, method, spelling, key)
                assert (status, challenge) == (401, "Bearer"), (method, spelling, key)
                assert body["error"]["type"] == "authentication_error"
                assert KEY not in json.dumps(body)


def test_a_strange_host_needs_a_key_first_and_is_refused_then(frontend: Any, url: str) -> None:
    for method, path in routes(build_app(frontend)):
        for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:8000", "", "manta.example.evil"):
            assert send(url, method, path, None, host)[0] == 401
            assert send(url, method, path, "wrong", host)[0] == 401
            status, body, _ = send(url, method, path, METRICS_TOKEN if path == "/metrics" else KEY, host)
            assert status == 400, (method, path, host)
            assert body["error"]["message"].startswith("Host: "), (method, path, host)


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:80", "10.1.2.3:8000", "manta.example."]
)
def test_our_own_names_pass_with_a_key(url: str, host: str) -> None:
    assert send(url, "GET", "/v1/models", KEY, host)[0] == 200


def test_a_key_opens_every_route_but_metrics(frontend: Any, url: str) -> None:
    for method, path in routes(build_app(frontend)):
        if path != "/metrics":
            assert send(url, method, path, KEY)[0] == (400 if method == "POST" else 200), path  # a POST without a body
    assert send(url, "GET", "/metrics", KEY)[0] == 401
    assert send(url, "GET", "/metrics", METRICS_TOKEN)[0] == 200
    assert send(url, "GET", "/v1/models", METRICS_TOKEN)[0] == 401


def test_public_paths_need_none(url: str) -> None:
    assert send(url, "GET", "/health")[0] == 200
    assert send(url, "GET", "/")[0] == 200


RIGHT, WRONG, OTHER = f"Bearer {KEY}", "Bearer wrong", "Bearer other"  # the last is another key that is known
SENT: list[tuple[list[tuple[str, str]], bool]] = [
    ([("authorization", RIGHT)], True),
    ([("x-api-key", KEY)], True),
    ([("x-api-key", f" {KEY} ")], True),
    ([("authorization", RIGHT), ("x-api-key", KEY)], True),
    ([("authorization", "Basic YTpi"), ("x-api-key", KEY)], True),  # a proxy's own
    ([("authorization", "Bearer "), ("x-api-key", KEY)], True),
    ([("x-api-key", "wrong")], False),
    ([("x-api-key", "")], False),
    ([("x-api-key", RIGHT)], False),
    ([("authorization", RIGHT), ("x-api-key", "wrong")], False),
    ([("authorization", RIGHT), ("x-api-key", "other")], False),
    ([("authorization", WRONG), ("x-api-key", KEY)], False),
    ([("authorization", OTHER), ("x-api-key", KEY)], False),
    ([("authorization", RIGHT), ("authorization", WRONG)], False),
    ([("authorization", RIGHT), ("authorization", RIGHT)], False),
    ([("x-api-key", KEY), ("x-api-key", "other")], False),
    ([("x-api-key", KEY), ("x-api-key", KEY)], False),
]


@pytest.mark.parametrize(("headers", "is_right"), SENT, ids=range(len(SENT)))
def test_a_key_comes_in_one_of_two_headers_and_two_keys_are_none(
    frontend: Any, url: str, headers: list[tuple[str, str]], is_right: bool
) -> None:
    """At both doors. Of two keys a proxy in front may have checked the one, and we would serve the other."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.putrequest("GET", "/v1/models")
    for name, value in headers:
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == (200 if is_right else 401)
    connection.close()
    with grpc_server(frontend) as channel:
        call = channel.unary_unary("/manta.v1.Manta/ListModels")
        try:
            call(b"", metadata=headers)
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]  # noqa: PT017
            assert not is_right
        else:
            assert is_right


def test_metrics_take_their_token_in_one_header_only(url: str) -> None:
    assert httpx.get(f"{url}/metrics", headers={"x-api-key": METRICS_TOKEN}).status_code == 401
    assert httpx.get(f"{url}/metrics", headers={"x-api-key": KEY}).status_code == 401


def test_every_rpc_but_health_needs_a_key(frontend: Any) -> None:
    service = chat_pb2.DESCRIPTOR.services_by_name["Manta"]
    with grpc_server(frontend) as channel:
        for rpc in service.methods:
            make = channel.unary_stream if rpc.server_streaming else channel.unary_unary
            call = make(f"/manta.v1.Manta/{rpc.name}")
            for key in (None, "", "wrong", "Bearer", "Bearer wrong", KEY, f"Basic {KEY}"):
                metadata = () if key is None else (("authorization", key),)
                with pytest.raises(grpc.RpcError) as refused:
                    list(call(b"", metadata=metadata))
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED, rpc.name  # type: ignore[attr-defined]
            code = grpc.StatusCode.OK
            try:
                list(call(b"", metadata=(("authorization", f"Bearer {KEY}"),)))
            except grpc.RpcError as error:
                code = error.code()  # type: ignore[attr-defined]
            takes_nothing = rpc.name in ("ListModels", "Detokenize")
            assert code == (grpc.StatusCode.OK if takes_nothing else grpc.StatusCode.INVALID_ARGUMENT), rpc.name
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


def test_without_keys_only_loopback_is_answered() -> None:
    access = AccessPolicy(GatewayConfig())
    for peer in ("127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"):
        assert access.identify([], peer) is None
        assert access.identify(["Bearer none"], peer) is None
    for peer in ("10.0.0.1", "::ffff:10.0.0.1", "fe80::1", "localhost.evil", "", None):
        with pytest.raises(Unauthorized, match="api_keys_file"):
            access.identify([], peer)
        with pytest.raises(Unauthorized):
            access.require_metrics_token([], peer)


def test_behind_a_proxy_that_listens_everywhere_nobody_is_answered_without_keys(tmp_path: Path) -> None:
    """HAProxy's connections come from loopback, whoever its own client is."""
    with pytest.raises(Unauthorized):
        AccessPolicy(GatewayConfig(host="0.0.0.0")).identify([], "127.0.0.1")
    assert AccessPolicy(config(tmp_path, host="0.0.0.0")).identify([f"Bearer {KEY}"], "10.0.0.1") is not None


def test_without_keys_a_page_of_another_site_is_refused(card: ModelCard) -> None:
    """DNS rebinding: the site's own name, resolved to 127.0.0.1."""
    with http_server(build_frontend(card, ScriptedCoordinator(tokens_script([])))) as url:
        assert send(url, "GET", "/v1/models")[0] == 200
        assert send(url, "GET", "/v1/models", host="evil.example")[0] == 400
        assert send(url, "GET", "/metrics", host="evil.example")[0] == 400


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "{url}", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "https://friend.example", "Sec-Fetch-Site": "cross-site"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}, 400),
        ({"Origin": "https://evil.example"}, 400),
        ({"Origin": "null"}, 400),
        ({"Origin": ""}, 400),
        ({"Origin": "http://localhost:1", "Sec-Fetch-Site": "same-site"}, 400),
        ({"Origin": "https://{host}.evil.example"}, 400),
        ({"Sec-Fetch-Site": "cross-site"}, 400),
    ],
)
def test_without_keys_only_our_own_page_and_friends_may_ask(
    card: ModelCard, headers: dict[str, str], status: int
) -> None:
    """A page of any site can POST to 127.0.0.1 without a content type, though it cannot read the answer."""
    coordinator = ScriptedCoordinator(tokens_script([40]))
    config = GatewayConfig(cors_origins=("https://friend.example",))
    with http_server(build_frontend(card, coordinator, config)) as url:
        host = url.removeprefix("http://")
        sent = {name: value.format(url=url, host=host) for name, value in headers.items()}
        content = b'{"model": "tiny", "prompt": "x"}'
        answer = httpx.post(f"{url}/v1/completions", content=content, headers=sent)
        assert answer.status_code == status, answer.text
        assert len(coordinator.requests) == (status == 200)
        assert httpx.get(f"{url}/v1/models", headers=sent).status_code == 200, "it does nothing, and cannot be read"
    if status == 400:
        assert answer.json()["error"]["param"] == "Origin"


def test_with_keys_the_key_is_what_counts(url: str) -> None:
    headers = {"Origin": "https://app.example", "Authorization": f"Bearer {KEY}"}
    body = {"model": "tiny", "prompt": "x"}
    assert httpx.post(f"{url}/v1/completions", json=body, headers=headers).status_code == 200


def test_any_host_can_be_allowed() -> None:
    assert AccessPolicy(GatewayConfig(allowed_hosts=("*",))).knows_host("evil.example")
    assert not AccessPolicy(GatewayConfig()).knows_host("evil.example")


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:127.0.0.1:50000", "127.0.0.1"),
        ("ipv6:%5B::1%5D:50000", "::1"),
        ("ipv6:[::ffff:10.0.0.1]:50000", "::ffff:10.0.0.1"),
        ("unix:/run/x", None),
        ("", None),
    ],
)
def test_grpcs_spelling_of_a_peer(peer: str, address: str | None) -> None:
    assert peer_address(peer) == address
