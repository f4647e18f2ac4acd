"""What went wrong on the way to a server, in one sentence: the cause is read off signs, and never off an address."""

import pytest
from nnsight.intervention.backends.remote import RemoteError

from ioi_mamba.remote import client


@pytest.mark.parametrize("port", ["33401", "40350", "50200", "4013", "15030"])
def test_a_port_that_holds_the_digits_of_a_status_code_is_no_status_code(port):
    host = f"http://127.0.0.1:{port}"
    error = ConnectionError(f"Cannot connect to {host}/subscribe/a401b-503c")
    assert client.in_plain_words(error, host).startswith(f"No answer from the server at {host}")
    assert not client._may_pass(RemoteError(f"the model at {host} is broken"))


@pytest.mark.parametrize(
    "text", ["HTTP 401: Unauthorized", "status (403)", "error:401", "Handshake status 403 Forbidden"]
)
def test_a_refused_key_is_told_by_its_status_code(text):
    assert client.in_plain_words(RemoteError(text), None).startswith("The server refuses the API key")


@pytest.mark.parametrize("text", ["Bad gateway: 502", "503 Service Unavailable", "the deployment was evicted"])
def test_a_failure_that_may_pass_is_tried_again(text):
    assert client._may_pass(RemoteError(text))
