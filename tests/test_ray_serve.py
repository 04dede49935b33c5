"""The example of docs/examples: two replicas on a CPU behind one address."""

import importlib.util
import json
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path
from time import monotonic

import pytest
from engines import small_model, some_prompts

FILE = Path(__file__).resolve().parent.parent / "docs" / "examples" / "ray_serve.py"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="needs Ray: pip install -e '.[serve]'"
    ),
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def of_both(handle):
    """The metrics of both replicas, whichever a call comes to."""
    found = {}
    for _ in range(200):
        replica, metrics = handle.metrics.remote().result(timeout_s=60)
        found[replica] = metrics
        if len(found) == 2:
            break
    assert len(found) == 2
    return list(found.values())


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A model, the handle of its two replicas, and their address."""
    import ray
    from ray import serve

    model = small_model(n_positions=4096, eos_token_id=None)
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    spec = importlib.util.spec_from_file_location("ray_serve_example", FILE)
    example = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    ray.cloudpickle.register_pickle_by_value(example)  # workers cannot import a lone file
    ray.init(num_cpus=4, include_dashboard=False)  # slots, not cores
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = {"model": str(folder), "replicas": "2", "gpus": "0", "num_pages": "300"}
    handle = serve.run(example.application(arguments))
    yield model, handle, f"http://127.0.0.1:{port}/"
    serve.shutdown()
    ray.shutdown()


def ask(url, **call):
    with urllib.request.urlopen(url, json.dumps(call).encode(), timeout=60) as answer:
        return [json.loads(line)["token"] for line in answer]


def test_two_replicas_share_the_requests(served):
    model, handle, _ = served
    prompts = some_prompts(16, longest=20)
    sampling = {"do_sample": True, "seed": 7}
    streams = [handle.options(stream=True).stream.remote(p, 8, sampling) for p in prompts]
    texts = [list(stream) for stream in streams]
    assert texts == [
        model.generate([p], 8, do_sample=True, seed=7)[0][len(p) :] for p in prompts
    ]  # fmt: skip
    finished = [metrics.finished for metrics in of_both(handle)]
    assert sum(finished) == 16
    assert min(finished) > 0


def test_a_client_that_goes_away_ends_its_request(served):
    _, handle, _ = served
    stream = handle.options(stream=True).stream.remote([5], 4000)
    next(stream)
    stream.cancel()
    give_up = monotonic() + 60
    while sum(metrics.cancelled for metrics in of_both(handle)) == 0:
        assert monotonic() < give_up
    assert [metrics.page_use for metrics in of_both(handle)] == [0, 0]


def test_tokens_come_over_http(served):
    model, _, url = served
    text = ask(url, prompt=[5, 6, 7], max_new_tokens=8)
    assert [5, 6, 7, *text] == model.generate([[5, 6, 7]], 8)[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"prompt": [], "max_new_tokens": 8}, "is empty"),
        ({"prompt": [5], "max_new_tokens": 8, "sampling": {"top_p": 2.0}}, "top_p"),
        ({"prompt": [5]}, "max_new_tokens"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(served, call, message):
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(served[2], **call)
    assert caught.value.code == 400
    assert message in json.loads(caught.value.read())["error"]
